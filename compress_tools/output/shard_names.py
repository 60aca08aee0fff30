"""Weight files of an output: which tensors share one, and what it is called."""

from collections.abc import Callable, Iterable

MAX_COPIED_BYTES = 2 * 10**9


def shard_names(total: int) -> list[str]:
    """Names of ``total`` weight files, in order, as transformers spells them."""
    return [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]


def group_by_bytes(names: Iterable[str], nbytes: Callable[[str], int]) -> list[list[str]]:
    """Split tensors that are copied through into groups of at most ``MAX_COPIED_BYTES``, in order.

    Args:
        names: of the tensors.
        nbytes: bytes of a tensor by its name; one above the limit has a group of its own.
    """
    groups: list[list[str]] = []
    size = MAX_COPIED_BYTES + 1
    for name in names:
        if size + nbytes(name) > MAX_COPIED_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes(name)
    return groups
