"""Result rows: targets, the table, the file."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.harness.environment import collect_environment, vector_instructions
from benchmarks.harness.rows import Row, format_value, print_rows, write_rows

ROWS = [
    Row("speed", 12.5, "tokens/s", context={"model": "small"}),
    Row.at_most("error", 0.3, "", 0.25),
    Row.at_least("ratio", 1.33, "x", 1.33),
]


def test_targets_decide_what_is_met():
    assert [(row.target, row.met) for row in ROWS] == [(None, None), (0.25, False), (1.33, True)]


@pytest.mark.parametrize("half", [{"target": 1.0}, {"met": True}], ids=["target", "met"])
def test_target_without_verdict_is_refused(half: dict):
    with pytest.raises(ValueError, match="target and met come together"):
        Row("speed", 1.0, "ms", **half)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_must_be_finite(value: float):
    with pytest.raises(ValueError, match="no finite number"):
        Row("speed", value)


def test_file_holds_rows_with_context_and_environment(tmp_path: Path):
    path = tmp_path / "new" / "rows.json"
    write_rows(ROWS, path)
    speed, error, ratio = json.loads(path.read_text())["rows"]
    assert speed["value"] == 12.5
    assert speed["target"] is None
    assert speed["met"] is None
    assert speed["model"] == "small"
    assert (error["target"], error["met"], ratio["met"]) == (0.25, False, True)
    for key in ("commit", "command", "cpu", "torch", "vllm", "triton", "gpu", "driver"):
        assert key in speed
    assert "context" not in speed


def test_rows_that_a_file_has_can_stay(tmp_path: Path):
    path = tmp_path / "rows.json"
    write_rows(ROWS, path, keep=lambda _: True)
    write_rows([Row("speed", 13.0, "tokens/s")], path, keep=lambda name: name != "speed")
    assert [(row["name"], row["value"]) for row in json.loads(path.read_text())["rows"]] == [
        ("error", 0.3),
        ("ratio", 1.33),
        ("speed", 13.0),
    ]
    write_rows([Row("speed", 14.0, "tokens/s")], path)
    assert [row["value"] for row in json.loads(path.read_text())["rows"]] == [14.0]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu sse2", None),
        ("sse2 avx2", "AVX2"),
        ("avx2 avx512f", "AVX-512"),
        ("avx2 avx512f avx512_vnni", "AVX-512 with VNNI"),
        ("avx2 avx512f avx512_vnni avx512_bf16 amx_bf16", "AVX-512 with BF16, VNNI, AMX"),
    ],
)
def test_vector_instructions(flags: str, expected: str | None):
    assert vector_instructions(flags.split()) == expected


def test_table_says_measured_target_and_met():
    text = io.StringIO()
    print_rows(ROWS, "figures", Console(file=text, width=200))
    lines = text.getvalue().splitlines()
    assert "12.5 tokens/s" in next(line for line in lines if "speed" in line)
    assert "no" in next(line for line in lines if "error" in line).split()
    assert "yes" in next(line for line in lines if "ratio" in line).split()
    # the caption is wrapped to the width of the table
    assert f"torch {collect_environment().torch}" in " ".join(text.getvalue().split())


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [(0.0123456, "s", "0.01235 s"), (12345.6, "ms", "12,346 ms"), (1234567, "B", "1,234,567 B"), ("ok", "", "ok")],
)
def test_values_for_people(value: float, unit: str, shown: str):
    assert format_value(value, unit) == shown
