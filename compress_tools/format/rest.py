"""Matrices beside the routed experts in 8-bit codes by row: ``value = code * scale``, code -127..127 (SPEC.md, 6).

A scale is bfloat16, one for each row, and codes are chosen for the scale as rounded. A row of zeros has scale 0.
"""

from math import prod

import torch
from torch import Tensor

from compress_tools.format.dtypes import DTYPES, dtype_name
from compress_tools.format.parts.base import SCALE_DTYPE

ROW_CODES, ROW_SCALES = "resmoe_row_codes", "resmoe_row_scales"
ROW_SUFFIXES = (ROW_CODES, ROW_SCALES)
ROW_CODES_DTYPE = "int8"
WEIGHT = ".weight"

LEVELS = 127
# Weights that are coded at a time: what an encoder holds in fp32.
_CHUNK = 2**24


def row_names(name: str) -> tuple[str, str]:
    """Names of codes and scales of ``<module>.weight``."""
    stem = name.removesuffix(WEIGHT)
    return f"{stem}.{ROW_CODES}", f"{stem}.{ROW_SCALES}"


def row_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of codes and scales of a matrix ``[N, K]``."""
    rows, columns = shape
    return (rows, columns), (rows, 1)


def row_bytes(shape: tuple[int, ...]) -> int:
    """Stored bytes of a matrix ``[N, K]`` in codes."""
    codes, scales = row_shapes(shape)
    return prod(codes) + prod(scales) * DTYPES[SCALE_DTYPE].itemsize


def encode_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 ``[N, K]`` and scales bfloat16 ``[N, 1]`` of a finite matrix: nearest codes, arithmetic in fp32."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, 1, dtype=DTYPES[SCALE_DTYPE])
    step = max(1, _CHUNK // max(columns, 1))
    for begin in range(0, rows, step):
        chunk = weight[begin : begin + step].float()
        largest = chunk.abs().amax(1, keepdim=True) if columns else torch.zeros(len(chunk), 1)
        scale = (largest / LEVELS).to(scales.dtype)
        # Rounded down by more than half a code, which happens among the smallest numbers there are: the next larger.
        short = largest > (LEVELS + 0.5) * scale.float()
        scale = torch.where(short, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
        wide = scale.float()
        levels = torch.where(wide > 0, chunk / wide, torch.zeros_like(chunk)).round().clamp(-LEVELS, LEVELS)
        codes[begin : begin + step], scales[begin : begin + step] = levels.to(torch.int8), scale
    return codes, scales


def decode_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``code * scale`` in fp32, then in ``dtype``: ``[N, K]``."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    step = max(1, _CHUNK // max(codes.shape[1], 1))
    for begin in range(0, len(codes), step):
        out[begin : begin + step] = codes[begin : begin + step].float() * scales[begin : begin + step].float()
    return out


def rows_fault(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> str | None:
    """What the format forbids in codes and scales of the right shapes; None where there is nothing.

    Args:
        codes: ``[N, K]``.
        scales: ``[N, 1]``.
        dtype: of the matrix that they stand for.
    """
    if not torch.isfinite(scales).all() or (scales < 0).any():
        return "holds a scale that is negative, NaN or infinite"
    if scales.numel() and float(scales.max()) * LEVELS > torch.finfo(dtype).max:
        return f"holds a scale of {float(scales.max()):.3g}, whose weights are beyond {dtype_name(dtype)}"
    if (codes == -LEVELS - 1).any():
        return f"holds the code {-LEVELS - 1}, expected {-LEVELS} to {LEVELS}"
    if (codes[(scales == 0).flatten()] != 0).any():
        return "holds codes in a row whose scale is 0"
    return None
