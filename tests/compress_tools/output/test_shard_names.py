"""Which tensors share a weight file, and its name: nothing lost, order kept, no file above the limit but a lone one."""

import pytest

from compress_tools.output import shard_names as module
from compress_tools.output.shard_names import group_by_bytes, shard_names


def test_names_are_numbered_from_one_and_sort_in_order() -> None:
    names = shard_names(12)
    assert names[0] == "model-00001-of-00012.safetensors"
    assert names[-1] == "model-00012-of-00012.safetensors"
    assert len(names) == len(set(names)) == 12
    assert sorted(names) == names
    assert shard_names(0) == []


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([10], [[10]]),
        ([4, 6], [[4, 6]]),
        ([4, 7], [[4], [7]]),
        ([11, 1, 9, 10, 12, 1], [[11], [1, 9], [10], [12], [1]]),
        ([0, 0, 10, 0], [[0, 0, 10, 0]]),
    ],
    ids=str,
)
def test_groups_keep_order_and_limit(
    sizes: list[int], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_COPIED_BYTES", 10)
    by_name = {f"tensor {number}": size for number, size in enumerate(sizes)}
    groups = group_by_bytes(by_name, by_name.__getitem__)
    assert [[by_name[name] for name in group] for group in groups] == expected
    assert [name for group in groups for name in group] == list(by_name)
