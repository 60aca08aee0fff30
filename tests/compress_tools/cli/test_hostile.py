"""Damaged input of every kind: a sentence and a documented exit code from every command, never a traceback."""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_tools.cli.commands import main
from compress_tools.config import make_config
from compress_tools.pipeline import compress

DOCUMENTED = {0, 2, 3, 4, 5}
COMMANDS: dict[str, tuple[str, ...]] = {
    "plan": ("plan", "{dense}", "--method", "prune"),
    "plan-budget": ("plan", "{dense}", "--target-bytes-ratio", "0.4", "--coders", "quantize"),
    "compress": ("compress", "{dense}", "{new}", "--method", "prune", "--center", "mean"),
    "probe": ("probe", "{dense}", "--max-layers", "1", "--experts", "2"),
    "inspect": ("inspect", "{small}"),
    "verify": ("verify", "{small}"),
    "verify-against": ("verify", "{small}", "--against", "{dense}"),
    "restore": ("restore", "{small}", "{new}"),
    "eval": ("eval", "{dense}", "--text", "{text}", "--max-tokens", "20"),
    "eval-against": ("eval", "{small}", "--text", "{text}", "--max-tokens", "20", "--against", "{dense}"),
}
# These measure weights or load models: fewer examples.
SLOW = {"plan-budget", "probe", "eval", "eval-against"}
# JSON values in place of others.
VALUES = st.sampled_from([None, True, -1, 0, 1, 3, 10**12, 1e308, "", "x", "\x00", "[/bold]", [], [1], {}, {"a": 1}])


def run(words: tuple[str, ...]) -> tuple[int, str]:
    """Exit code and stderr of the command, in this process."""
    err = StringIO()
    with patch.object(sys, "argv", ["resmoe", *words]), patch("sys.stderr", err), patch("sys.stdout", StringIO()):
        try:
            main()
        except SystemExit as stop:
            return int(str(stop.code or 0)), err.getvalue()
    return 0, err.getvalue()


@pytest.fixture(scope="module")
def models(trained: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model and what it was compressed to, with tokenizer and text."""
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(trained[0], folder / "dense")
    compress(trained[0], folder / "small", make_config(method="quantize", bits=4, center="mean", center_bits=8))
    return folder


def copied(models: Path, target: Path) -> Path:
    """Links to the models, which are replaced and never written to."""
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(models, target, copy_function=os.link)


def paths_in(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, inner in items for found in paths_in(inner, (*path, key)))]


def changed_json(content: bytes, pick: random.Random, value: object) -> bytes:
    """One value of a JSON file replaced, or dropped."""
    found = json.loads(content)
    *path, last = pick.choice(paths_in(found)[1:])
    place = found
    for key in path:
        place = place[key]
    if pick.random() < 0.3:
        del place[last]
    else:
        place[last] = value
    return json.dumps(found).encode()


def changed_header(content: bytes, pick: random.Random, value: object) -> bytes:
    """One value in the header of a weight file replaced, or dropped."""
    count = int.from_bytes(content[:8], "little")
    header = changed_json(content[8 : 8 + count], pick, value)
    return len(header).to_bytes(8, "little") + header + content[8 + count :]


def flipped(content: bytes, pick: random.Random) -> bytes:
    """Some bits turned round."""
    changed = bytearray(content)
    for _ in range(pick.randint(1, 20)):
        changed[pick.randrange(len(changed))] ^= 1 << pick.randrange(8)
    return bytes(changed)


MANGLES: dict[str, Callable[[bytes, random.Random, object], bytes | None]] = {
    "missing": lambda *_: None,
    "empty": lambda *_: b"",
    "pointer": lambda *_: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4873\n",
    "cut": lambda content, pick, _: content[: pick.randrange(len(content) + 1)],
    "random": lambda content, pick, _: pick.randbytes(min(len(content), 1000)),
    "flipped": lambda content, pick, _: flipped(content, pick),
    "text": lambda content, pick, value: json.dumps(value).encode(),
}


def check_mangled(command: str, models: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Mangle one file that a command reads, and run it."""
    words = COMMANDS[command]
    folder = copied(models, tmp_path / "x")
    used = [name for name in ("dense", "small") if "{" + name + "}" in words]
    files = sorted(
        file
        for name in used
        for file in (folder / name).iterdir()
        if file.name.endswith((".safetensors", "config.json", "index.json", "report.json", "tokenizer.json"))
    )
    file = data.draw(st.sampled_from(files), label="file")
    kinds = [*MANGLES, "directory", *(["json"] * 6 if file.suffix == ".json" else ["header"] * 2)]
    kind, pick = data.draw(st.sampled_from(kinds), label="kind"), random.Random(data.draw(st.integers(0, 2**32)))
    content, value = file.read_bytes(), data.draw(VALUES, label="value")
    file.unlink()
    if kind == "directory":
        file.mkdir()
    else:
        mangle = {**MANGLES, "json": changed_json, "header": changed_header}[kind]
        if (mangled := mangle(content, pick, value)) is not None:
            file.write_bytes(mangled)
    places = {name: folder / name for name in ("dense", "small", "new")} | {"text": folder / "dense" / "heldout.txt"}
    code, stderr = run(tuple(word.format(**places) for word in words))
    assert code in DOCUMENTED, stderr
    assert "Traceback" not in stderr
    assert "Errno" not in stderr
    if code:
        assert stderr.splitlines()[-1].startswith("resmoe: ")
        assert not (folder / "new").exists()


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - SLOW))
@settings(max_examples=30)
@given(data=st.data())
def test_mangled_files(command: str, models: Path, tmp_path: Path, data: st.DataObject) -> None:
    check_mangled(command, models, tmp_path, data)


@pytest.mark.parametrize("command", sorted(SLOW))
@settings(max_examples=8)
@given(data=st.data())
def test_mangled_files_of_slow_commands(command: str, models: Path, tmp_path: Path, data: st.DataObject) -> None:
    check_mangled(command, models, tmp_path, data)
