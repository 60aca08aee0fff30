"""Every file of a source is copied through, or its report says why not."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compress_tools.config import make_config
from compress_tools.errors import CheckpointError
from compress_tools.pipeline import compress
from compress_tools.source.reader import CheckpointReader
from compress_tools.source.source_reader import SourceReader

QUICK = make_config(center="mean", workers=1)

COPIED = {
    "tokenizer.json": "tokenizer.json",
    "modeling_own.py": "modeling_own.py",
    "README.md": "SOURCE_README.md",
    "original/README.md": "original/README.md",
    "original/params.json": "original/params.json",
    # Only at the top are these names the checkpoint's own.
    "1_Pooling/config.json": "1_Pooling/config.json",
    "original/model.safetensors.index.json.txt": "original/model.safetensors.index.json.txt",
    "assets/resmoe_report.json": "assets/resmoe_report.json",
}
LEFT_OUT = {
    "adapter_model.safetensors": "its index does not name them",
    "original/model.safetensors": "its index does not name them",
    "original/consolidated.00.pth": "another format",
    "pytorch_model-00001-of-00002.bin": "another format",
    "pytorch_model.bin.index.json": "index of weights that are left out",
    "consolidated.safetensors.index.json": "index of weights that are left out",
    "original/model.safetensors.index.json": "index of weights that are left out",
    "hf_quant_config.json": "quantisation",
    "resmoe_report.json": "an earlier run's account",
    "resmoe_plan.yaml": "an earlier run's account",
    "SOURCE_README.md": "its place is taken",
    "linked": "a link to a directory",
    "pipe": "no regular file",
}
NOBODYS = [".gitattributes", ".git/config", ".cache/huggingface/x.json", "__pycache__/x.pyc", "original/.hidden"]


@pytest.fixture
def source(tiny_olmoe: Path, tmp_path: Path) -> Path:
    path = shutil.copytree(tiny_olmoe, tmp_path / "source")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("x")
    for name in (*COPIED, *LEFT_OUT, *NOBODYS):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if name == "linked":
            (path / name).symlink_to(tmp_path / "elsewhere")
        elif name == "pipe":
            os.mkfifo(path / name)
        elif name.endswith(".safetensors"):
            save_file({"x": torch.zeros(1)}, path / name)
        else:
            (path / name).write_text(f'{{"name": "{name}"}}')
    return path


def test_every_file_is_copied_or_named(source: Path, tiny_olmoe: Path, tmp_path: Path) -> None:
    report = compress(source, tmp_path / "small", QUICK)
    plain = {str(file.relative_to(tiny_olmoe)) for file in CheckpointReader(tiny_olmoe).other_files()}
    everything = {file.relative_to(source).as_posix() for file in source.rglob("*") if not file.is_dir()} | {"linked"}
    assert everything == {*COPIED, *LEFT_OUT, *NOBODYS, *plain, "config.json", "model.safetensors"}
    for name, target in COPIED.items():
        assert (tmp_path / "small" / target).read_bytes() == (source / name).read_bytes()
    assert set(report.left_out) == set(LEFT_OUT)
    for name, why in LEFT_OUT.items():
        assert why in report.left_out[name]
    # Both are there, and are others.
    ours = {"resmoe_report.json", "SOURCE_README.md"}
    assert {name for name in LEFT_OUT if (tmp_path / "small" / name).exists()} == ours
    assert all((tmp_path / "small" / name).read_bytes() != (source / name).read_bytes() for name in ours)
    assert json.loads((tmp_path / "small/resmoe_report.json").read_text())["left_out"] == report.left_out
    assert not any((tmp_path / "small" / name).exists() for name in NOBODYS)


@pytest.mark.parametrize("name", ["tokenizer.json", "original/params.json"])
def test_a_link_that_leads_nowhere(name: str, source: Path) -> None:
    (source / name).unlink()
    (source / name).symlink_to(source / "blobs" / "gone")
    with pytest.raises(CheckpointError, match=rf"{name}: is a link that leads nowhere; download the file, or remove"):
        SourceReader(source)


def test_a_directory_that_can_not_be_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("original"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    # Root may read everything, so the refusal is made up.
    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(CheckpointError, match="original: not readable: permission denied"):
        SourceReader(source)


@pytest.mark.parametrize("name", ["tokenizer.json", "original/params.json"])
def test_a_file_that_can_not_be_read_is_refused_before_the_work(
    name: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.access
    # Root may read everything, so the refusal is made up; what is left out need not be readable.
    closed = {source / name, source / "pytorch_model-00001-of-00002.bin"}
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in closed and real(path, mode))
    with pytest.raises(CheckpointError, match=rf"{name}: not readable: permission denied; make it readable, or remove"):
        SourceReader(source)
    closed.remove(source / name)
    assert SourceReader(source).files()[name] is None
