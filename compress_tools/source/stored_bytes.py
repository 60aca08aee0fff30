"""Bytes of a safetensors file as a tensor, without the file."""

import torch
from torch import Tensor

# As safetensors' own reader of files has them: its Python part lacks the last two.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
}


def as_tensor(octets: bytearray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor that these bytes are; it shares their memory.

    Args:
        octets: as stored.
        dtype: as safetensors spells it.
        shape: sizes.
    Raises:
        RuntimeError: they are none, or torch lacks the dtype.
    """
    if dtype not in _DTYPES:
        raise RuntimeError(f"Dtype not understood: {dtype}")
    kind = _DTYPES[dtype]
    if kind == torch.float4_e2m1fn_x2 and shape:
        # Two numbers in each byte, which torch counts as one.
        shape = (*shape[:-1], shape[-1] // 2)
    return torch.frombuffer(octets, dtype=kind).reshape(shape) if octets else torch.empty(shape, dtype=kind)
