"""A weight file from outside: which one it is, and one pass over its bytes."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress_tools.errors import CheckpointError
from compress_tools.format.shard_file import SinglePass, file_checksum, first_cut_tensor, read_header, shard_digest

KIB = 1024


def shard(path: Path) -> Path:
    """A tensor of 9 KiB, one of nothing, and one of one number."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "long": torch.randint(0, 256, (9 * KIB,), generator=generator, dtype=torch.uint8),
        "none": torch.empty(0, 4),
        "one": torch.tensor(1.5, dtype=torch.bfloat16),
    }
    save_file(tensors, path)
    return path


def edited(file: Path, position: int) -> Path:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("offset", [0, 4 * KIB - 1, 5 * KIB, 9 * KIB - 1], ids=["first", "4 KiB", "sampled", "last"])
def test_the_digest_samples_both_ends_of_a_tensor(offset: int, tmp_path: Path) -> None:
    file = shard(tmp_path / "x.safetensors")
    before, long = shard_digest(file), read_header(file)["long"]
    start = file.stat().st_size - max(stored.end for stored in read_header(file).values())
    assert long.nbytes == 9 * KIB
    edited(file, start + long.begin + offset)
    assert shard_digest(file) != before


def test_one_pass_gives_the_tensors_and_the_checksum(tmp_path: Path) -> None:
    file = shard(tmp_path / "x.safetensors")
    content = SinglePass(file)
    found = {name: (stored, bytes(octets)) for name, stored, octets in content}
    expected = load_file(file)
    assert found.keys() == expected.keys()
    for name, (stored, octets) in found.items():
        assert stored.shape == tuple(expected[name].shape)
        assert octets == expected[name].reshape(-1).view(torch.uint8).numpy().tobytes()
    assert content.checksum == file_checksum(file) == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("size", [0, 4, 20, -1])
def test_a_cut_file(size: int, tmp_path: Path) -> None:
    file = shard(tmp_path / "x.safetensors")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"x.safetensors: can't be read: it.* (cut off|too early)"):
        list(SinglePass(file))


def test_the_first_tensor_that_is_cut(tmp_path: Path) -> None:
    file = shard(tmp_path / "x.safetensors")
    assert first_cut_tensor(file) == ""
    file.write_bytes(file.read_bytes()[:-1])
    assert first_cut_tensor(file).startswith("; 1 tensors are cut off, first ")


@pytest.mark.parametrize("header", [b"[]", b"{}}", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [1]}}'])
def test_a_damaged_header(header: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    for read in (read_header, shard_digest, lambda path: list(SinglePass(path))):
        with pytest.raises(CheckpointError, match=r"x.safetensors: can't be read"):
            read(file)
    assert first_cut_tensor(file) == ""
