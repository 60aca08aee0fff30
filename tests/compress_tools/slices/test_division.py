"""Dividing the work, and slices found again, without compressing anything."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.output.run_record import MANIFEST_NAME
from compress_tools.output.target import Shard
from compress_tools.slices.merge import find_slices
from compress_tools.slices.slices import FILES_DIR, Slice, SliceManifest, files_of, make_slice, shards_of, slice_path


def plan_of(copied: int, layers: int) -> SimpleNamespace:
    """The part of a target that is divided: copied shards first, then one for each layer."""
    files = [Shard(f"copied-{number}", None, (f"c{number}",)) for number in range(copied)]
    return SimpleNamespace(shards=(*files, *(Shard(f"layer-{number}", number, ()) for number in range(layers))))


@pytest.mark.parametrize(("copied", "layers", "count"), [(1, 3, 3), (5, 7, 3), (0, 4, 4), (2, 9, 1)])
def test_every_shard_is_in_one_slice_and_layers_are_neighbours(copied: int, layers: int, count: int) -> None:
    plan = plan_of(copied, layers)
    parts = [shards_of(plan, Slice(number, count)) for number in range(1, count + 1)]
    assert sorted(shard.filename for part in parts for shard in part) == sorted(s.filename for s in plan.shards)
    for part in parts:
        own = [shard.layer for shard in part if shard.layer is not None]
        assert own == list(range(own[0], own[0] + len(own)))
        assert layers // count <= len(own) <= layers // count + 1


def test_as_many_slices_as_layers_and_no_more() -> None:
    assert [len(shards_of(plan_of(0, 4), Slice(number, 4))) for number in (1, 2, 3, 4)] == [1] * 4
    with pytest.raises(ConfigError, match="--shard 1/5: 4 layers are to be compressed, so at most 4 slices"):
        shards_of(plan_of(9, 4), Slice(1, 5))


@pytest.mark.parametrize(("text", "number", "count"), [("1/1", 1, 1), (" 4/4 ", 4, 4), ("2/10", 2, 10)])
def test_numbers_of_slices(text: str, number: int, count: int) -> None:
    part = make_slice(text)
    assert (part.number, part.count, str(part)) == (number, count, text.strip())


def test_only_the_first_slice_has_the_files() -> None:
    files = {Path("tokenizer.json"): Path("/src/tokenizer.json")}
    assert files_of(files, Slice(1, 2)) == {FILES_DIR / "tokenizer.json": Path("/src/tokenizer.json")}
    assert files_of(files, Slice(2, 2)) == {}


def test_slices_beside_the_destination_are_found_by_name(tmp_path: Path) -> None:
    """Finished or not, each once, sorted; no file, no other name, no other destination's."""
    dst = tmp_path / "out[1]"
    for name in (
        "out[1].shard-2-of-2",
        "out[1].shard-1-of-2.partial",
        "out[1].shard-2-of-2.partial",
        "out[1].shard-1-of-2.log",
        "out[1].shard-x-of-2",
        "out1.shard-1-of-2",
        "out[1].shard-1-of-2.old",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "out[1].shard-3-of-3").write_text("a file")
    assert find_slices(dst) == [tmp_path / "out[1].shard-1-of-2", tmp_path / "out[1].shard-2-of-2"]
    assert slice_path(dst, Slice(2, 2)) == tmp_path / "out[1].shard-2-of-2"
    assert find_slices(tmp_path / "none") == []


@pytest.mark.parametrize("size", [9, 10, 11])
def test_a_shard_of_another_size_is_none(tmp_path: Path, size: int) -> None:
    manifest = SliceManifest(tmp_path, Slice(1, 1), {}, None, {"a": {"bytes": 10}, "b": {"bytes": 1}})
    (tmp_path / "a").write_bytes(b"x" * size)
    assert manifest.has_shard("a", tmp_path) == (size == 10)
    assert not manifest.has_shard("a", tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="missing, or not of" if size != 10 else "b: missing, or not of 1 bytes"):
        manifest.check_shards()


def test_files_of_a_slice_are_those_below_its_folder(tmp_path: Path) -> None:
    manifest = SliceManifest(tmp_path, Slice(1, 1), {}, None, {})
    assert manifest.files() == {}
    (tmp_path / FILES_DIR / "deep").mkdir(parents=True)
    (tmp_path / FILES_DIR / "deep" / "z.json").write_text("1")
    (tmp_path / FILES_DIR / "a.json").write_text("2")
    (tmp_path / MANIFEST_NAME).write_text("{}")
    assert manifest.files() == {
        Path("a.json"): tmp_path / FILES_DIR / "a.json",
        Path("deep/z.json"): tmp_path / FILES_DIR / "deep" / "z.json",
    }
