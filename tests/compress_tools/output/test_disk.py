"""Disks that fill up and sources that break: one clear sentence, exit code 4, and the same bytes once it is mended."""

import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compress_tools.config import make_config
from compress_tools.errors import CheckpointError, ConfigError, NumericalError
from compress_tools.output.staging import Staging
from compress_tools.output.writer import CheckpointWriter
from compress_tools.pipeline import compress, compress_slice
from compress_tools.progress.listener import Silent
from compress_tools.slices.merge import merge
from compress_tools.slices.slices import Slice
from tests.compress_tools.test_pipeline import contents

QUICK = make_config(center="mean", workers=1)


def directory_bytes(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB of its own."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)


def fill(disk: Path, leave_bytes: int) -> Path:
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - leave_bytes))
    return filler


def test_a_disk_too_small_is_refused_before_any_work(tiny_mixtral: Path, small_disk: Path) -> None:
    fill(small_disk, 64_000)
    with pytest.raises(CheckpointError, match="free; make room"):
        compress(tiny_mixtral, small_disk / "small", QUICK)
    assert not (small_disk / "small").exists()


class FillLater(Silent):
    """Another process takes the disk while layer 1 is compressed."""

    def __init__(self, disk: Path) -> None:
        self.disk = disk
        self.filler: Path | None = None

    def stage(self, text: str, total: int | None, layer: int | None = None) -> None:
        if (layer, text) == (1, "residuals"):
            self.filler = fill(self.disk, 20_000)


def test_a_disk_that_fills_up_is_resumed(tiny_mixtral: Path, small_disk: Path, tmp_path: Path) -> None:
    others = FillLater(small_disk)
    with pytest.raises(CheckpointError, match=r"No space left on device.*make room.*--resume"):
        compress(tiny_mixtral, small_disk / "small", QUICK, progress=others)
    assert not (small_disk / "small").exists()
    with pytest.raises(CheckpointError, match="free; make room"):
        compress(tiny_mixtral, small_disk / "small", QUICK, resume=True)
    others.filler.unlink()
    compress(tiny_mixtral, small_disk / "small", QUICK, resume=True)
    compress(tiny_mixtral, tmp_path / "whole" / "small", QUICK)
    assert contents(small_disk / "small") == contents(tmp_path / "whole" / "small")


def test_the_output_and_no_more_fits(tiny_mixtral: Path, small_disk: Path, tmp_path: Path) -> None:
    """Neither the check nor the work wants more than the output, up to a file system's blocks and small files."""
    compress(tiny_mixtral, tmp_path / "small", QUICK)
    fill(small_disk, directory_bytes(tmp_path / "small") + 64_000)
    compress(tiny_mixtral, small_disk / "small", QUICK)
    assert contents(small_disk / "small") == contents(tmp_path / "small")


def test_merging_on_one_disk_needs_no_room(tiny_mixtral: Path, small_disk: Path) -> None:
    for number in (1, 2):
        compress_slice(tiny_mixtral, small_disk / "small", QUICK, Slice(number, 2))
    fill(small_disk, 100_000)
    merge(small_disk / "small")
    assert directory_bytes(small_disk / "small") > 300_000


def limit_file_size() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def test_the_command_when_a_write_fails(tiny_mixtral: Path, tmp_path: Path) -> None:
    target = tmp_path / "small"
    words = [sys.executable, "-m", "compress_tools", "compress", str(tiny_mixtral), str(target)]
    words += ["--method", "prune", "--center", "mean"]
    failed = subprocess.run(words, capture_output=True, text=True, preexec_fn=limit_file_size)
    assert failed.returncode == 4, failed.stderr
    assert "--resume" in failed.stderr
    assert "Traceback" not in failed.stderr
    log = (tmp_path / "small.log").read_text()
    assert "copying other tensors" in log
    assert "Traceback" in log
    assert "File too large" in log
    assert not target.exists()
    compress(tiny_mixtral, target, QUICK, resume=True)
    compress(tiny_mixtral, tmp_path / "whole" / "small", QUICK)
    assert contents(target) == contents(tmp_path / "whole" / "small")


@pytest.fixture
def source(tiny_mixtral: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_mixtral, tmp_path / "source")


def test_truncated_shard_names_file_and_tensor(source: Path, tmp_path: Path) -> None:
    shard = sorted(source.glob("*.safetensors"))[-1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=rf"{shard.name}.*1 tensors are cut off, first 'model\.") as caught:
        compress(source, tmp_path / "small", QUICK)
    assert caught.value.exit_code == 4
    shard.write_bytes(whole[:50])
    with pytest.raises(CheckpointError, match=f"{shard.name}: truncated or corrupt shard"):
        compress(source, tmp_path / "small", QUICK)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}.*missing"):
        compress(source, tmp_path / "small", QUICK)
    assert not Staging(tmp_path / "small").path.exists()


def test_a_source_that_breaks_meanwhile_is_resumed_once_repaired(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repaired file is a new file of the same content: its time of change must not matter."""
    from compress_tools.source.reader import CheckpointReader

    read = CheckpointReader.get

    def broken(reader: CheckpointReader, name: str) -> torch.Tensor:
        tensor = read(reader, name)
        return tensor * float("nan") if ".layers.1." in name and ".experts.2." in name else tensor

    monkeypatch.setattr(CheckpointReader, "get", broken)
    with pytest.raises(NumericalError, match=r"layers\.1\..*experts\.2\..*NaN"):
        compress(source, tmp_path / "small", QUICK)
    monkeypatch.undo()
    for shard in source.glob("*.safetensors"):
        content = shard.read_bytes()
        shard.unlink()
        shard.write_bytes(content)
    compress(source, tmp_path / "small", QUICK, resume=True)
    compress(source, tmp_path / "whole" / "small", QUICK)
    assert contents(tmp_path / "small") == contents(tmp_path / "whole" / "small")


def test_never_more_than_one_layer_in_memory(
    tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    from compress_tools import pipeline

    work = pipeline.compress_layer
    alive: list[int] = []
    made: list[weakref.ref[torch.Tensor]] = []

    def watched(*arguments: object) -> object:
        alive.append(sum(reference() is not None for reference in made))
        compressed = work(*arguments)
        made.extend(weakref.ref(tensor) for tensor in compressed.tensors.values())
        return compressed

    monkeypatch.setattr(pipeline, "compress_layer", watched)
    compress(tiny_mixtral, tmp_path / "small", QUICK)
    assert alive == [0, 0, 0]
    assert len(made) > 30


def test_places_where_it_may_not_write(tiny_mixtral: Path, small_disk: Path, source: Path) -> None:
    with pytest.raises(CheckpointError, match="mount point"):
        compress(tiny_mixtral, small_disk, QUICK)
    with pytest.raises(ConfigError, match="one inside the other"):
        compress(source, source / "small", QUICK)
    with pytest.raises(ConfigError, match="one inside the other"):
        compress(source, source.parent, QUICK, overwrite=True)
    with pytest.raises(CheckpointError, match="root of a file system"):
        CheckpointWriter("/", {})
    assert not (source / "small").exists()
