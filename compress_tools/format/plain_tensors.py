"""Dtypes of tensors that this project copies and does not define: a weight is a floating-point number."""

import re
from collections import defaultdict
from collections.abc import Mapping

from compress_tools.format.shard_file import StoredTensor
from compress_tools.format.tensors import is_resmoe_name

# What a loader makes no numbers of without a scale, such as fp8, is no weight by itself either: `compress` decodes it.
FLOATS = ("BF16", "F16", "F32", "F64")
_WEIGHT = re.compile(r"(?:.*[._])?(?:weight|bias)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# A mask of an attention, [1, 1, L, L] of truth values, which early models call a bias.
_MASK_DIMENSIONS = 4


def dtype_fault(headers: Mapping[str, StoredTensor]) -> str | None:
    """Which plain tensor holds anything else than floating-point numbers where those are due; None where none does.

    They are due in what is called a weight or a bias, and in what holds them in other layers. Tables of whole numbers,
    which some models have (experts by token, positions), are called otherwise.

    Args:
        headers: all tensors by name.
    Returns:
        a sentence that begins with the tensor's name.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in headers:
        if not is_resmoe_name(name):
            groups[_NUMBER.sub("*", name)].append(name)
    for kin in groups.values():
        odd = [name for name in kin if headers[name].dtype not in FLOATS]
        if not odd:
            continue
        found = headers[odd[0]]
        sentence = (
            f"{odd[0]!r} is {found.dtype} {list(found.shape)}, expected floating-point numbers ({', '.join(FLOATS)})"
        )
        if _WEIGHT.fullmatch(odd[0]) and len(found.shape) != _MASK_DIMENSIONS:
            return sentence
        if len(odd) < len(kin):
            usual = next(name for name in kin if name not in odd)
            return f"{sentence} as {usual!r} holds"
    return None
