"""Memory that restored weights stand in, those of one layer at a time: shared by all layers of a device."""

import os

import torch
from torch import Tensor

from compress_tools.errors import KernelUnsupportedError

SCRATCH_VARIABLE = "RESMOE_GPU_SCRATCH_MIB"
# Gate and up of OLMoE's 64 experts; of larger layers some experts are restored at a time.
_DEFAULT_MIB = 512
# A weight's first byte is at a multiple of it, for wide loads.
_ALIGNMENT = 256

_scratch: dict[torch.device, Tensor] = {}


def scratch_limit() -> int:
    """Bytes: what ``RESMOE_GPU_SCRATCH_MIB`` says, or 512 MiB."""
    return number_setting(SCRATCH_VARIABLE, _DEFAULT_MIB) * 2**20


def number_setting(name: str, default: int) -> int:
    """An environment variable's whole number, at least 0; the default where it is not set.

    Raises:
        KernelUnsupportedError: it is no such number.
    """
    text = os.environ.get(name, "").strip()
    if text and not text.isdecimal():
        raise KernelUnsupportedError(f"{name} is {text!r}; give a whole number, at least 0, or leave it out")
    return int(text) if text else default


def chunk_experts(weights: int, experts: int, elements: int, itemsize: int) -> int:
    """How many experts are restored at a time, as few times as the limit allows and evenly; at least one.

    Args:
        weights: matrices of an expert that are needed together.
        experts: of the group.
        elements: of one matrix.
        itemsize: bytes of an element.
    """
    return -(-experts // -(-experts // _most(weights, elements, itemsize)))


def scratch_bytes(weights: int, experts: int, elements: int, itemsize: int) -> int:
    """What a layer takes, however its experts fall into groups: so layers of one shape take equally much."""
    return weights * min(experts, _most(weights, elements, itemsize)) * _rounded(elements * itemsize)


def _most(weights: int, elements: int, itemsize: int) -> int:
    return max(1, scratch_limit() // (weights * _rounded(elements * itemsize)))


def scratch(device: torch.device, nbytes: int) -> Tensor:
    """At least so many bytes, uint8; the same memory for all who ask, until one needs more."""
    found = _scratch.get(device)
    if found is None or found.numel() < nbytes:
        # who has the old one keeps it: a CUDA graph may have its address
        found = _scratch[device] = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return found


def matrices(memory: Tensor, count: int, experts: int, shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """So many ``[experts, rows, columns]`` in a scratch, one behind the other, each aligned."""
    rows, columns = shape
    used = experts * rows * columns * dtype.itemsize
    return [
        memory[start : start + used].view(dtype).view(experts, rows, columns)
        for start in range(0, count * _rounded(used), _rounded(used))
    ]


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
