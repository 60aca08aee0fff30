"""A shard seen from outside: its digest, its checksum, and what a cut-off file lacks."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compress_tools.errors import CheckpointError
from compress_tools.format import shard_file
from compress_tools.format.shard_file import SinglePass, file_checksum, first_cut_tensor, shard_digest

# Four times what is read at one place, and some more; the names are not in the order of the bytes.
SIZES = {"zeta": 4 * 4096 + 8, "alpha": 9 * 1024, "middle": 64}


def write(path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    save_file({name: torch.randint(256, (n,), generator=generator).byte() for name, n in SIZES.items()}, path)
    return path


def data_begins(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def places(file: Path) -> dict[str, tuple[int, int]]:
    """First byte and the one after the last of each tensor, in the file."""
    content, start = file.read_bytes(), data_begins(file)
    header = json.loads(content[8:start])
    return {
        name: (start + header[name]["data_offsets"][0], start + header[name]["data_offsets"][1])
        for name in header
        if name != "__metadata__"
    }


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("end", ["first", "last", "4096th", "4096th from the end"])
def test_a_tensors_ends_are_digested(tmp_path: Path, name: str, end: str) -> None:
    file = write(tmp_path / "a.safetensors")
    before = shard_digest(file)
    assert shard_digest(file) == before
    begin, after = places(file)[name]
    size = after - begin
    places_of_ends = {"first": 0, "last": size - 1, "4096th": 4095, "4096th from the end": size - 4096}
    flip(file, begin + min(max(places_of_ends[end], 0), size - 1))
    assert shard_digest(file) != before


def test_samples_lie_at_fixed_distances_in_a_long_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "_SAMPLE_BYTES", 16)
    monkeypatch.setattr(shard_file, "_SAMPLE_EVERY_BYTES", 1000)
    file = write(tmp_path / "a.safetensors")
    before, (begin, _) = shard_digest(file), places(file)["zeta"]
    seen = set()
    for place in [*range(0, 40), *range(990, 1030), *range(2990, 3030)]:
        flip(file, begin + place)
        if shard_digest(file) != before:
            seen.add(place)
        flip(file, begin + place)
    assert shard_digest(file) == before
    assert seen == {*range(0, 16), *range(1000, 1016), *range(3000, 3016)}


def test_header_and_size_are_digested(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors")
    before, content = shard_digest(file), file.read_bytes()
    file.write_bytes(content.replace(b'"middle"', b'"muddle"'))
    assert shard_digest(file) != before
    file.write_bytes(content + b"\0")
    assert shard_digest(file) != before


def test_the_checksum_is_of_the_whole_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors")
    assert file_checksum(file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_one_pass_hashes_what_lies_behind_the_last_tensor(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors")
    for behind in (b"", b"more"):
        file.write_bytes(file.read_bytes() + behind)
        content = SinglePass(file)
        assert {name: stored.nbytes for name, stored, _ in content} == SIZES
        assert content.checksum == file_checksum(file)


def test_cut_off_tensors_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors")
    content, spans = file.read_bytes(), places(file)
    assert first_cut_tensor(file) == ""
    order = sorted(spans, key=lambda name: spans[name][0])
    for cut in range(len(order)):
        # one byte less than what the tensor needs, then exactly as much as those before it need
        file.write_bytes(content[: spans[order[cut]][1] - 1])
        assert first_cut_tensor(file) == f"; {len(order) - cut} tensors are cut off, first {order[cut]!r}"
        file.write_bytes(content[: spans[order[cut]][0]])
        assert first_cut_tensor(file) == f"; {len(order) - cut} tensors are cut off, first {order[cut]!r}"


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda content: b"",
    "no JSON": lambda content: (2).to_bytes(8, "little") + b"[}",
    "no length": lambda content: content[:5],
    "length beyond the file": lambda content: (2**62).to_bytes(8, "little") + content[8:],
    "header cut off": lambda content: content[:30],
    "header of another kind": lambda content: (2).to_bytes(8, "little") + b"[]" + content,
    "entry without offsets": lambda content: (9).to_bytes(8, "little") + b'{"a": {}}' + content,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_header_is_an_error_with_a_sentence(tmp_path: Path, damage: str) -> None:
    file = write(tmp_path / "a.safetensors")
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert first_cut_tensor(file) == ""
    with pytest.raises(CheckpointError, match=r"a\.safetensors: can't be read: "):
        shard_digest(file)


def test_a_missing_file_is_an_error_with_a_sentence(tmp_path: Path) -> None:
    assert first_cut_tensor(tmp_path / "none") == ""
    with pytest.raises(CheckpointError, match="can't be read"):
        shard_digest(tmp_path / "none")
