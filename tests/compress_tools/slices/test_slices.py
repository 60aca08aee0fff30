"""Slices of a compression and their merge: the bytes of one run, and every mix-up refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from compress_tools.config import make_config
from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.output.run_record import MANIFEST_NAME
from compress_tools.pipeline import compress, compress_slice
from compress_tools.progress.listener import Silent
from compress_tools.slices.merge import find_slices, merge
from compress_tools.slices.slices import Slice, make_slice, slice_path
from compress_tools.stored.inspection import inspect
from tests.compress_tools.test_pipeline import contents

QUICK = make_config(center="mean", workers=1)


@pytest.fixture(scope="module")
def whole(tiny_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("whole") / "small"
    compress(tiny_mixtral, target, QUICK)
    return target


@pytest.fixture(scope="module")
def made_once(tiny_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("slices") / "small"
    for number in (1, 2, 3):
        compress_slice(tiny_mixtral, target, QUICK, Slice(number, 3))
    return target.parent


@pytest.fixture
def slices(made_once: Path, tmp_path: Path) -> Path:
    """Three whole slices beside ``small``, which does not exist."""
    return shutil.copytree(made_once, tmp_path / "slices")


@pytest.mark.parametrize(
    "text", ["5/4", "0/4", "a/b", "1", "1/", "/4", "-1/4", "1/0", "1/4/2", "", "1.0/4", "\u0661/\u0664"]
)
def test_refused_slices(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--shard.*such as 1/4"):
        make_slice(text)


@pytest.mark.parametrize(("items", "count"), [(3, 1), (3, 2), (3, 3), (1, 4), (32, 5), (0, 2)])
def test_slices_divide_the_work(items: int, count: int) -> None:
    parts = [make_slice(f"{number}/{count}").of(list(range(items))) for number in range(1, count + 1)]
    assert [item for part in parts for item in part] == list(range(items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("method", ["prune", "low-rank"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_merged_slices_are_the_bytes_of_one_run(count: int, method: str, tiny_mixtral: Path, tmp_path: Path) -> None:
    config = make_config(method=method, max_iterations=2)
    compress(tiny_mixtral, tmp_path / "one" / "small", config)
    for number in reversed(range(1, count + 1)):
        part = compress_slice(tiny_mixtral, tmp_path / "many" / "small", config, Slice(number, count))
        assert part == tmp_path / "many" / f"small.shard-{number}-of-{count}"
    report = merge(tmp_path / "many" / "small")
    assert contents(tmp_path / "many" / "small") == contents(tmp_path / "one" / "small")
    assert [layer.layer for layer in report.layers] == [0, 1, 2]
    timings = json.loads((tmp_path / "many" / "small" / "resmoe_timings.json").read_text())
    assert list(timings) == ["0", "1", "2"]


def test_a_slice_is_no_checkpoint(slices: Path) -> None:
    for path in find_slices(slices / "small"):
        assert not (path / "config.json").exists()
        with pytest.raises(CheckpointError, match=r"config\.json: missing"):
            inspect(path)


def test_merging_links_and_leaves_the_slices(slices: Path, whole: Path) -> None:
    before = contents(slices)
    merge(slices / "small")
    for path in find_slices(slices / "small"):
        for shard in path.glob("*.safetensors"):
            assert shard.stat().st_ino == (slices / "small" / shard.name).stat().st_ino
    assert {name: content for name, content in contents(slices).items() if not name.startswith("small/")} == before
    assert contents(slices / "small") == contents(whole)


def test_merging_can_remove_the_slices(slices: Path, whole: Path) -> None:
    merge(slices / "small", remove_slices=True)
    assert [path.name for path in slices.iterdir()] == ["small"]
    assert contents(slices / "small") == contents(whole)


def no_links(*_: object) -> None:
    raise OSError("this file system has no links")


def test_slices_from_elsewhere_are_copied(
    slices: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_links)
    names = [slices / f"small.shard-{number}-of-3" for number in (3, 1, 2)]
    merge(tmp_path / "here" / "small", names)
    assert contents(tmp_path / "here" / "small") == contents(whole)


def drop(slices: Path) -> None:
    shutil.rmtree(slices / "small.shard-2-of-3")


def unfinished(slices: Path) -> None:
    (slices / "small.shard-2-of-3").rename(slices / "small.shard-2-of-3.partial")


def twice(slices: Path) -> None:
    shutil.rmtree(slices / "small.shard-2-of-3")
    shutil.copytree(slices / "small.shard-3-of-3", slices / "small.shard-2-of-3")


def other_division(slices: Path) -> None:
    shutil.copytree(slices / "small.shard-3-of-3", slices / "small.shard-3-of-4")
    manifest = slices / "small.shard-3-of-4" / MANIFEST_NAME
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "slice": [3, 4]}))


def no_slice(slices: Path) -> None:
    (slices / "small.shard-2-of-3" / MANIFEST_NAME).unlink()


def garbled(slices: Path) -> None:
    (slices / "small.shard-2-of-3" / MANIFEST_NAME).write_text("{}")


def shard_of(slices: Path) -> Path:
    return next((slices / "small.shard-2-of-3").glob("*.safetensors"))


def cut_off(slices: Path) -> None:
    os.truncate(shard_of(slices), 1000)


def lost(slices: Path) -> None:
    shard_of(slices).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, "slice 2/3 is missing"),
        (unfinished, "shard-2-of-3: not finished.*--resume"),
        (twice, "slice 3/3 is given twice"),
        (other_division, "slice 3/4.*slice 1/3"),
        (no_slice, "shard-2-of-3: not a slice"),
        (garbled, "resmoe_slice.json: not readable"),
        (cut_off, r"model-0000\d-of-00004.safetensors: missing, or not of \d+ bytes"),
        (lost, r"model-0000\d-of-00004.safetensors: missing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_slices_that_do_not_fit(damage: Callable[[Path], None], message: str, slices: Path) -> None:
    damage(slices)
    before = contents(slices)
    with pytest.raises(CheckpointError, match=message):
        merge(slices / "small", remove_slices=True)
    assert contents(slices) == before


def test_slices_of_other_runs(slices: Path, tiny_mixtral: Path, tmp_path: Path) -> None:
    other = make_config(center="mean", retain_ratio=0.5)
    part = Slice(2, 3)
    with pytest.raises(CheckpointError, match=r"not empty"):
        compress_slice(tiny_mixtral, slices / "small", other, part)
    compress_slice(tiny_mixtral, slices / "small", other, part, overwrite=True)
    with pytest.raises(CheckpointError, match=r"shard-2-of-3.*another recipe.*retain_ratio 0\.25, now 0\.5"):
        merge(slices / "small")
    source = shutil.copytree(tiny_mixtral, tmp_path / "source")
    shard = sorted(source.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-4] + b"edit")
    compress_slice(source, slices / "small", QUICK, part, overwrite=True)
    with pytest.raises(CheckpointError, match=f"shard-2-of-3.*another source.*{shard.name}"):
        merge(slices / "small")
    with pytest.raises(CheckpointError, match=r"no slices nothing\.shard-I-of-N"):
        merge(slices / "nothing")


def test_a_copied_source_is_the_same_source(slices: Path, tiny_mixtral: Path, whole: Path, tmp_path: Path) -> None:
    """Another machine's copy has other times; only the first slice says where the source was."""
    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_mixtral.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    compress_slice(source, slices / "small", QUICK, Slice(2, 3), overwrite=True)
    merge(slices / "small")
    assert contents(slices / "small") == contents(whole)


def test_more_slices_than_layers(tiny_mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--shard 1/4: 3 layers are to be compressed, so at most 3"):
        compress_slice(tiny_mixtral, tmp_path / "small", QUICK, Slice(1, 4))
    assert not list(tmp_path.iterdir())


def test_merging_into_something(slices: Path, whole: Path) -> None:
    (slices / "small").mkdir()
    (slices / "small" / "old.txt").write_text("old")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(CheckpointError, match="not empty"):
            merge(slices / "small", **options)
    assert (slices / "small" / "old.txt").read_text() == "old"
    (slices / "small" / "old.txt").unlink()
    merge(slices / "small")
    with pytest.raises(CheckpointError, match="not empty"):
        merge(slices / "small")
    merge(slices / "small", overwrite=True)
    assert contents(slices / "small") == contents(whole)


def test_different_machines_are_said(slices: Path) -> None:
    manifest = slice_path(slices / "small", Slice(2, 3)) / MANIFEST_NAME
    manifest.write_text(manifest.read_text().replace('"device": "cpu"', '"device": "NVIDIA H200"'))
    said: list[str] = []

    class Listener(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    merge(slices / "small", progress=Listener())
    assert "different machines" in said[0]
    assert "H200" in said[0]
