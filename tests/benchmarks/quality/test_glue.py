"""The classification benchmark: its file layouts, and the order of methods that it must show."""

from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.quality.glue import COMPARED, MERGED, Example, compare, read_examples, standard_library_task
from compress_tools.errors import CheckpointError


def test_both_layouts_of_files(tmp_path: Path) -> None:
    tsv, jsonl = tmp_path / "dev.tsv", tmp_path / "dev.jsonl"
    tsv.write_text("sentence\tlabel\nit's \"fine\t1\nit is not\t0\n")
    jsonl.write_text('{"sentence": "it\'s \\"fine", "label": 1}\n\n{"sentence": "it is not", "label": 0}\n')
    expected = [Example("it's \"fine", 1), Example("it is not", 0)]
    assert read_examples(tsv) == expected
    assert read_examples(jsonl) == expected


@pytest.mark.parametrize(
    "text", ["sentence\tlabel\nwhat\t2\n", "text\tlabel\nwhat\t1\n", "sentence\tlabel\nalone\n"], ids=repr
)
def test_other_layouts_are_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "dev.tsv"
    file.write_text(text)
    with pytest.raises(CheckpointError, match="SST-2"):
        read_examples(file)
    with pytest.raises(CheckpointError, match="SST-2"):
        read_examples(tmp_path / "missing.tsv")


def test_the_made_task_is_disjoint_and_seeded() -> None:
    train, dev = standard_library_task(seed=1, limit=400)
    assert (len(train), len(dev)) == (400, 100)
    assert {example.label for example in train} == {0, 1}
    assert not {example.sentence for example in train} & {example.sentence for example in dev}
    assert standard_library_task(seed=1, limit=400) == (train, dev)


@pytest.mark.slow
def test_centers_beat_plain_methods_in_error() -> None:
    train, dev = standard_library_task(seed=0, limit=800)
    rows = compare(train, dev[:32], 0.25, experts=3, steps=5, seed=0, console=Console(quiet=True))
    error = {row.context["method"]: row.value for row in rows if row.name.endswith("error")}
    assert set(error) == {*COMPARED, *MERGED}
    assert error["ResMoE (UP)"] < error["plain pruning (UP)"]
    assert error["ResMoE (SVD)"] < error["plain SVD"]
    assert error["ResMoE (UP)"] < error["merging, aligned average"]
