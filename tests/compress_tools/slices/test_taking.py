"""Shards go from slices to the checkpoint one by one, so that a merge needs no second copy of them."""

from pathlib import Path

import pytest

from compress_tools.config import make_config
from compress_tools.pipeline import compress_slice
from compress_tools.progress.listener import Silent
from compress_tools.slices.merge import find_slices, merge
from compress_tools.slices.slices import Slice


@pytest.mark.parametrize("remove", [False, True], ids=["kept", "removed"])
def test_a_shard_leaves_its_slice_once_it_is_taken(remove: bool, tiny_olmoe: Path, tmp_path: Path) -> None:
    target = tmp_path / "small"
    for number in (1, 2):
        compress_slice(tiny_olmoe, target, make_config(center="mean", workers=1), Slice(number, 2))
    left: list[int] = []

    class Counting(Silent):
        def shard_done(self) -> None:
            left.append(len([file for part in find_slices(target) for file in part.glob("*.safetensors")]))

    begun = sum(len(list(part.glob("*.safetensors"))) for part in find_slices(target))
    assert begun >= 3
    merge(target, remove_slices=remove, progress=Counting())
    assert left == [begun - taken if remove else begun for taken in range(1, begun + 1)]
    assert bool(find_slices(target)) != remove
