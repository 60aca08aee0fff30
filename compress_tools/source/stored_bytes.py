"""Bytes of a safetensors file as a tensor, without the file."""

import json
from functools import cache

import torch
from safetensors.torch import load
from torch import Tensor


def as_tensor(octets: bytearray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor that these bytes are; it shares their memory.

    Args:
        octets: as stored.
        dtype: as safetensors spells it.
        shape: sizes.
    Raises:
        RuntimeError, SafetensorError, AttributeError: they are none, or torch lacks the dtype.
    """
    kind = _torch_dtype(dtype)
    return torch.frombuffer(octets, dtype=kind).reshape(shape) if octets else torch.empty(shape, dtype=kind)


@cache
def _torch_dtype(dtype: str) -> torch.dtype:
    """By the library's own table: of an empty tensor of a file that holds nothing else."""
    header = json.dumps({"x": {"dtype": dtype, "shape": [0], "data_offsets": [0, 0]}}).encode()
    return load(len(header).to_bytes(8, "little") + header)["x"].dtype
