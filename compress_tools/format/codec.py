"""What stored tensors mean: decode of each part, and ``restore_expert``, the one truth (SPEC.md, 4).

Rows are in design-matrix orientation: ``rows[projection]`` is ``[I, H]``, ``down_proj`` transposed. All arithmetic
is in fp32. ``encode_bitmap`` and ``encode_row_bitmap`` are here because a bitmap's order of values is the format's.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from compress_tools.errors import FormatError
from compress_tools.format.packing import mask_row_counts, pack_mask, unpack_mask
from compress_tools.format.quantization import decode_levels, dequantize, expand_scales
from compress_tools.format.schema import (
    BitmapResidual,
    LayerSpec,
    LowRankResidual,
    Projection,
    QuantizedResidual,
    ResidualPart,
    RowBitmapResidual,
)
from compress_tools.format.tensors import (
    CENTER,
    CENTER_CODES,
    CENTER_SCALES,
    CODES,
    MASK,
    ROW_VALUE_CODES,
    ROW_VALUES,
    SCALES,
    U_CODES,
    U_SCALES,
    V_CODES,
    V_SCALES,
    VALUE_CODES,
    VALUE_SCALES,
    VALUES,
    U,
    V,
)
from compress_tools.numerics.products import product

Rows = dict[Projection, Tensor]
Stored = Mapping[tuple[Projection, str], Tensor]


def encode_bitmap(rows: Rows, keep: Rows, dtype: torch.dtype) -> dict[tuple[Projection, str], Tensor]:
    """Store kept entries as masks and one value stream: projections in order, row by row, column by column."""
    projections = tuple(rows)
    stored = {(projection, MASK): pack_mask(keep[projection]) for projection in projections}
    values = torch.cat([rows[projection][keep[projection]] for projection in projections])
    return {**stored, (projections[0], VALUES): values.to(dtype)}


def encode_row_bitmap(rows: Rows, keep: Rows, dtype: torch.dtype) -> dict[tuple[Projection, str], Tensor]:
    """Store kept entries, equally many in every row, as masks and values ``[I, N]`` for each projection."""
    stored = {(projection, MASK): pack_mask(mask) for projection, mask in keep.items()}
    for projection, mask in keep.items():
        stored[projection, ROW_VALUES] = rows[projection][mask].view(len(mask), -1).to(dtype)
    return stored


def decode_bitmap(part: BitmapResidual, stored: Stored, hidden_size: int) -> Rows:
    """Kept values, or levels times scales, where their bits are set; zero elsewhere.

    Raises:
        FormatError: the masks and the value count disagree.
    """
    keep = {projection: unpack_mask(stored[projection, MASK], hidden_size) for projection in part.projections}
    counts = [int(mask.count_nonzero()) for mask in keep.values()]
    if sum(counts) != part.values_per_expert:
        raise FormatError(f"masks keep {sum(counts)} values, {part.values_per_expert} are stored")
    if part.value_bits is None:
        values = stored[part.projections[0], VALUES].float()
    else:
        values = decode_levels(stored[part.projections[0], VALUE_CODES], part.value_bits, part.values_per_expert)
    return {
        projection: _scaled(part, _scatter(keep[projection], own), stored, projection)
        for projection, own in zip(part.projections, values.split(counts), strict=True)
    }


def decode_row_bitmap(part: RowBitmapResidual, stored: Stored, hidden_size: int) -> Rows:
    """As ``decode_bitmap``; every row has its own values.

    Raises:
        FormatError: a row's mask and the value count disagree.
    """
    rows: Rows = {}
    for projection in part.projections:
        mask = stored[projection, MASK]
        if (counts := mask_row_counts(mask)).ne(part.values_per_row).any():
            raise FormatError(
                f"{projection}: a row's mask keeps {int(counts[counts != part.values_per_row][0])} values, "
                f"{part.values_per_row} are stored"
            )
        if part.value_bits is None:
            values = stored[projection, ROW_VALUES].float()
        else:
            values = decode_levels(stored[projection, ROW_VALUE_CODES], part.value_bits, part.values_per_row)
        rows[projection] = _scaled(part, _scatter(unpack_mask(mask, hidden_size), values), stored, projection)
    return rows


def _scatter(keep: Tensor, values: Tensor) -> Tensor:
    return torch.zeros(keep.shape, device=keep.device).masked_scatter_(keep, values)


def _scaled(part: BitmapResidual | RowBitmapResidual, dense: Tensor, stored: Stored, projection: Projection) -> Tensor:
    if part.value_bits is None:
        return dense
    return dense * expand_scales(stored[projection, VALUE_SCALES], dense.shape[-1], part.group_size)


def decode_low_rank(part: LowRankResidual, stored: Stored, hidden_size: int) -> Rows:
    """``U @ V`` for each projection."""
    left = restore_left_factor(part, stored)
    return {
        projection: product(left, restore_right_factor(part, stored, projection, hidden_size))
        for projection in part.projections
    }


def restore_left_factor(part: LowRankResidual, stored: Stored) -> Tensor:
    """U, fp32 ``[I, R]``."""
    first = part.projections[0]
    if part.factor_bits is None:
        return stored[first, U].float()
    return dequantize(stored[first, U_CODES], stored[first, U_SCALES], part.factor_bits, part.rank, None)


def restore_right_factor(part: LowRankResidual, stored: Stored, projection: Projection, hidden_size: int) -> Tensor:
    """V of one projection, fp32 ``[R, H]``."""
    if part.factor_bits is None:
        return stored[projection, V].float()
    return dequantize(stored[projection, V_CODES], stored[projection, V_SCALES], part.factor_bits, hidden_size, None)


def decode_quantized(part: QuantizedResidual, stored: Stored, hidden_size: int) -> Rows:
    """Levels times scales for each projection."""
    return {
        projection: dequantize(
            stored[projection, CODES], stored[projection, SCALES], part.bits, hidden_size, part.group_size
        )
        for projection in part.projections
    }


_DECODERS: dict[str, Callable[..., Rows]] = {
    "bitmap": decode_bitmap,
    "bitmap_rows": decode_row_bitmap,
    "low_rank": decode_low_rank,
    "quantized": decode_quantized,
}


def decode_part(part: ResidualPart, stored: Stored, hidden_size: int) -> Rows:
    """One residual part, fp32 ``[I, H]`` for each of its projections.

    Raises:
        FormatError: masks and value counts disagree.
    """
    return _DECODERS[part.method](part, stored, hidden_size)


def decode_residual(layer: LayerSpec, stored: Stored, hidden_size: int) -> Rows:
    """Sum of the residual's parts, fp32 ``[I, H]`` for each projection; ``layer`` as from ``LayerSpec.of_expert``."""
    if layer.groups is not None:
        raise ValueError("a layer of several groups has no one residual; pass layer.of_expert(expert)")
    total: Rows = {}
    for part in layer.residual:
        for projection, value in decode_part(part, stored, hidden_size).items():
            total[projection] = total[projection] + value if projection in total else value
    return total


def restore_center(layer: LayerSpec, shared: Stored, hidden_size: int) -> Rows:
    """The center that every expert of the layer shares, fp32 ``[I, H]`` for each projection that has one."""
    rows: Rows = {}
    for part in layer.center:
        for projection in part.projections:
            if part.method == "dense":
                rows[projection] = shared[projection, CENTER].float()
            else:
                codes, scales = shared[projection, CENTER_CODES], shared[projection, CENTER_SCALES]
                rows[projection] = dequantize(codes, scales, part.bits, hidden_size, part.group_size)
    return rows


def restore_expert(layer: LayerSpec, shared: Stored, stored: Stored, hidden_size: int) -> Rows:
    """Restored expert: center + decoded residual, added in fp32, in design-matrix orientation.

    Args:
        layer: the layer's spec as this expert is stored: ``LayerSpec.of_expert``.
        shared: the layer's shared tensors by (projection, suffix).
        stored: the expert's tensors by (projection, suffix).
        hidden_size: H.
    Returns:
        fp32 ``[I, H]`` for each projection.
    Raises:
        FormatError: masks and value counts disagree.
    """
    rows = decode_residual(layer, stored, hidden_size)
    for projection, center in restore_center(layer, shared, hidden_size).items():
        rows[projection] = rows[projection] + center
    return rows
