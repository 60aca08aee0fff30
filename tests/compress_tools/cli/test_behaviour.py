"""What a command says where the input is no checkpoint, no plan or no text; what it prints can be typed back."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compress_tools.cli import commands
from compress_tools.config import make_config
from compress_tools.pipeline import compress
from tests.compress_tools.cli.conftest import Resmoe


@pytest.fixture(scope="module")
def small(tiny_olmoe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("behaviour") / "small"
    compress(tiny_olmoe, path, make_config(center="mean"))
    return path


NO_CHECKPOINT = ["plan {x}", "compress {x} {new}", "probe {x}", "inspect {x}", "verify {x}", "restore {x} {new}"]


@pytest.mark.parametrize("words", [*NO_CHECKPOINT, "verify {small} --against {x}", "eval {x} --text {text}"])
@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("missing", "no such directory; expected a Hugging Face checkpoint"),
        ("file", "is a file; expected the directory of a Hugging Face checkpoint"),
        ("empty directory", "config.json: missing; expected a Hugging Face checkpoint directory"),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else None,
)
def test_what_is_no_checkpoint(
    kind: str, sentence: str, words: str, resmoe: Resmoe, small: Path, tmp_path: Path
) -> None:
    places = {"x": tmp_path / "x", "new": tmp_path / "new", "small": small, "text": tmp_path / "text"}
    places["text"].write_text("some text")
    if kind == "file":
        places["x"].touch()
    elif kind == "empty directory":
        places["x"].mkdir()
    code, stdout, stderr = resmoe(*words.format(**places).split())
    assert (code, stdout) == (4, "")
    last = stderr.splitlines()[-1]
    assert last.startswith(f"resmoe: {places['x']}")
    assert sentence in last


@pytest.mark.parametrize("command", ["plan", "compress"])
@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("missing", "not readable: no such file or directory; expected a text file"),
        ("directory", "not readable: is a directory; expected a text file"),
        ("binary", "is not text in UTF-8: byte 0 is 0xff"),
        ("pointer", "is a Git LFS pointer"),
        ("empty", "expected a mapping with version and layers"),
    ],
    ids=lambda value: value.split(":")[0],
)
def test_what_is_no_plan(
    kind: str, sentence: str, command: str, resmoe: Resmoe, tiny_olmoe: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.yaml"
    contents = {"binary": b"\xff\xfe\x00", "pointer": b"version https://git-lfs.github.com/spec/v1\n", "empty": b""}
    if kind == "directory":
        plan.mkdir()
    elif kind in contents:
        plan.write_bytes(contents[kind])
    dst = [tmp_path / "new"] if command == "compress" else []
    code, stdout, stderr = resmoe(command, tiny_olmoe, *dst, "--plan", plan)
    assert (code, stdout) == (2, "")
    assert sentence in stderr
    assert str(plan) in stderr
    assert len(stderr.splitlines()) == 1


def test_against_a_compressed_checkpoint(resmoe: Resmoe, small: Path) -> None:
    code, stdout, stderr = resmoe("verify", small, "--against", small)
    assert (code, stdout) == (2, "")
    assert stderr == f"resmoe: --against {small}: is a ResMoE checkpoint; give the original that it was made from\n"


@pytest.mark.parametrize("command", ["inspect", "verify", "restore"])
def test_a_dense_checkpoint_in_place_of_a_compressed_one(
    command: str, resmoe: Resmoe, tiny_olmoe: Path, tmp_path: Path
) -> None:
    code, _, stderr = resmoe(command, tiny_olmoe, *([tmp_path / "new"] if command == "restore" else []))
    assert code == 4
    assert "not a ResMoE checkpoint" in stderr


def test_printed_commands_can_be_typed_back(resmoe: Resmoe, tiny_olmoe: Path, tmp_path: Path) -> None:
    awkward = tmp_path / "my $HOME [bold] 'it'"
    awkward.mkdir()
    source = awkward / "the model"
    shutil.copytree(tiny_olmoe, source)
    code, stdout, stderr = resmoe("compress", source, awkward / "small one", "--method", "prune", "--center", "mean")
    assert code == 0, stderr
    last = stdout.splitlines()[-1]
    assert last.startswith(f"Written to {awkward / 'small one'}. Next: ")
    assert shlex.split(last.partition("Next: ")[2]) == ["vllm", "serve", str(awkward / "small one")]
    plan = awkward / "the plan.yaml"
    wanted = ("--target-bytes-ratio", "0.4", "--coders", "quantize", "--center", "mean")
    code, stdout, stderr = resmoe("plan", source, *wanted, "--out", plan)
    assert code == 0, stderr
    typed = shlex.split(stdout.splitlines()[-1].partition("Next: ")[2])
    assert typed == ["resmoe", "compress", str(source), "DST", "--plan", str(plan)]
    code, stdout, stderr = resmoe("compress", source, awkward / "new", "--shard", "1/2", "--plan", plan)
    assert code == 0, stderr
    assert shlex.split(stdout.splitlines()[-1].partition("there: ")[2]) == ["resmoe", "merge", str(awkward / "new")]


def test_verify_says_how_far_it_is(resmoe: Resmoe, small: Path, tiny_olmoe: Path) -> None:
    code, _, stderr = resmoe("verify", small, "--against", tiny_olmoe)
    assert code == 0
    said = [line.split(" INFO ")[1] for line in stderr.splitlines()]
    assert said[0] == "3 files to go"
    assert sum(line.startswith("reading model-0000") for line in said) == 3
    assert any(line.startswith("layer 1: comparing with the source") for line in said)
    assert said[-1].startswith("file 3 of 3 done")
    assert resmoe("verify", small, "--json")[2] == ""


def test_a_fault_of_our_own_keeps_its_traceback(resmoe: Resmoe, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("made up")

    monkeypatch.setattr("compress_tools.stored.inspection.inspect", broken)
    code, stdout, stderr = resmoe("inspect", small)
    assert (code, stdout) == (1, "")
    assert "Traceback" in stderr
    assert "ZeroDivisionError: made up" in stderr
    assert stderr.splitlines()[-1].startswith("resmoe: ZeroDivisionError: a fault of resmoe itself")


def test_what_the_system_refuses_names_the_file(resmoe: Resmoe, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/some/where")

    monkeypatch.setattr("compress_tools.stored.inspection.inspect", refused)
    code, stdout, stderr = resmoe("inspect", small)
    assert (code, stdout) == (4, "")
    assert stderr == "resmoe: /some/where: permission denied; make it accessible, or choose another\n"


def test_a_reader_that_goes_away(small: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "compress_tools", "inspect", str(small)]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_documented_exit_codes_are_the_errors_own() -> None:
    from compress_tools import errors

    documented = {int(line.split()[0]) for line in commands.EXIT_CODES.splitlines() if line.strip()[:1].isdigit()}
    own = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)}
    assert documented == {0, 130} | own
