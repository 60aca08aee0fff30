"""What codes mean: ``value = (code - (2**bits - 1) / 2) * scale``, levels symmetric about zero (SPEC.md, 4).

There is no level at zero (mid-rise): better than mid-tread at every width below 8 bits, by a quarter of the error
at 2 bits (docs/notes/coders.md).
Scales are bfloat16 whatever the checkpoint's dtype: they have fp32's range, so the residuals of nearly equal experts
neither underflow nor overflow, and the codes are chosen for the scale as rounded.
"""

from torch import Tensor

from compress_tools.format.packing import unpack_codes


def half_range(bits: int) -> float:
    """Largest level in units of the scale: ``(2**bits - 1) / 2``."""
    return ((1 << bits) - 1) / 2


def expand_scales(scales: Tensor, columns: int, group_size: int | None) -> Tensor:
    """A scale for each column: ``[..., I, G]`` to fp32 ``[..., I, columns]``, or ``[..., I, 1]`` for whole rows."""
    wide = scales.float()
    return wide if group_size is None else wide.repeat_interleave(group_size, -1)[..., :columns]


def decode_levels(packed: Tensor, bits: int, size: int) -> Tensor:
    """Levels in units of the scale: uint8 ``[..., code_row_bytes(bits, N)]`` to fp32 ``[..., N]``."""
    return unpack_codes(packed, bits, size).float() - half_range(bits)


def dequantize(packed: Tensor, scales: Tensor, bits: int, columns: int, group_size: int | None) -> Tensor:
    """Rows of codes and scales to values.

    Args:
        packed: uint8 ``[..., I, code_row_bytes(bits, columns)]``.
        scales: ``[..., I, num_groups(columns, group_size)]``.
        bits: 2, 3, 4 or 8.
        columns: columns of a row.
        group_size: columns that share a scale; None for the whole row.
    Returns:
        fp32 ``[..., I, columns]``.
    """
    return decode_levels(packed, bits, columns) * expand_scales(scales, columns, group_size)
