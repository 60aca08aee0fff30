"""Arguments as somebody types them who is in a hurry, or means no good: a sentence that names the argument."""

import os
from pathlib import Path

import pytest

from compress_tools.config import make_config
from compress_tools.pipeline import compress
from tests.compress_tools.cli.conftest import Resmoe


@pytest.fixture(scope="module")
def places(tiny_olmoe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("arguments")
    compress(tiny_olmoe, folder / "small", make_config(center="mean", workers=1))
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    os.mkfifo(folder / "pipe")
    return {"src": tiny_olmoe, "folder": folder, **{name: folder / name for name in ("small", "empty", "file", "pipe")}}


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ("compress|{src}|{folder}/new|--layers|0-999999999", 2, "no experts in layers [2]; MoE layers are 0-1"),
        ("compress|{src}|{folder}/new|--layers|7-999999999", 2, "no experts in layers [7]; MoE layers are 0-1"),
        ("compress|{src}|{folder}/new|--layers|" + "9" * 5000, 2, "expected all, decoder, top:N, bottom:N, or indices"),
        ("compress|{src}|{folder}/new|--layers|top:" + "9" * 5000, 2, "expected all, decoder, top:N"),
        ("compress|{src}|{folder}/new|--layers|0-", 2, "expected all, decoder, top:N"),
        ("compress|{src}|{folder}/new|--layers|top:0", 2, "the model has 2 MoE layers; ask for 1 or more of them"),
        ("compress||{folder}/new", 2, "the checkpoint is an empty string; name a directory"),
        ("compress|{pipe}|{folder}/new", 4, "pipe: is no directory; expected the directory of a Hugging Face"),
        ("compress|{file}|{folder}/new", 4, "file: is a file; expected the directory of a Hugging Face"),
        ("compress|{src}|/proc/new|--method|prune", 4, "/proc/new.partial: can't write: no such file or directory"),
        (
            "compress|{src}|/proc/new",
            4,
            "resmoe: /proc/new.plan.yaml: the plan can't be kept: no such file or directory",
        ),
        ("merge|{folder}/new|{file}", 4, "file: not a slice, it has no resmoe_slice.json"),
        ("plan|{src}|--target-bytes-ratio|0.4|--out|", 2, "--out: an empty string; name a file"),
        ("plan|{src}|--target-bytes-ratio|0.4|--out|{pipe}|--overwrite", 2, "pipe: is no regular file"),
        ("inspect|", 2, "the checkpoint is an empty string"),
        ("verify|{small}|--against|", 2, "the checkpoint is an empty string"),
        ("verify|{small}|--against|{file}", 4, "file: is a file; expected the directory"),
        ("verify|{src}", 4, "not a ResMoE checkpoint"),
        ("restore|{src}|{folder}/new", 4, "not a ResMoE checkpoint"),
        ("probe|{empty}", 4, "config.json: missing; expected a Hugging Face checkpoint directory"),
    ],
)
def test_an_argument_that_makes_no_sense(
    words: str, code: int, sentence: str, places: dict[str, Path], resmoe: Resmoe
) -> None:
    found, _, stderr = resmoe(*words.format(**places).split("|"))
    assert (found, "Traceback" in stderr, "Errno" in stderr) == (code, False, False), stderr
    assert sentence in stderr
    assert not (places["folder"] / "new").exists()


def test_the_census_is_printed(places: dict[str, Path], resmoe: Resmoe) -> None:
    code, stdout, _ = resmoe("verify", places["small"], "--against", places["src"])
    assert code == 0
    assert "All of the source is accounted for: 48 tensors replaced, 21 copied; 1 files copied; 0 left out." in stdout
