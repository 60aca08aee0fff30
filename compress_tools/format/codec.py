"""What stored tensors mean: encode and decode of each part, and ``restore_expert``, the one truth (SPEC.md, 4).

Rows are in design-matrix orientation: ``rows[projection]`` is ``[I, H]``, ``down_proj`` transposed.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from compress_tools.errors import FormatError
from compress_tools.format.schema import LayerSpec, Projection
from compress_tools.format.tensors import CENTER, MASK, VALUES, U, V, mask_row_bytes

Rows = dict[Projection, Tensor]
Stored = Mapping[tuple[Projection, str], Tensor]


def pack_mask(keep: Tensor) -> Tensor:
    """Pack booleans ``[I, H]`` into uint8 ``[I, mask_row_bytes(H)]``; column c is bit ``c % 8`` of byte ``c // 8``."""
    size_i, size_h = keep.shape
    padded = torch.zeros(size_i, 8 * mask_row_bytes(size_h), dtype=torch.uint8)
    padded[:, :size_h] = keep
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (padded.view(size_i, -1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, hidden_size: int) -> Tensor:
    """Inverse of ``pack_mask``: uint8 ``[..., mask_row_bytes(H)]`` to bool ``[..., H]``, on the mask's device."""
    bits = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask.unsqueeze(-1) >> bits) & 1).flatten(-2)[..., :hidden_size].bool()


def mask_row_counts(mask: Tensor) -> Tensor:
    """Kept values per row: uint8 ``[..., bytes]`` to int64 ``[...]``."""
    table = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int64, device=mask.device)
    return table[mask.long()].sum(-1)


def encode_bitmap(rows: Rows, keep: Rows, dtype: torch.dtype) -> dict[tuple[Projection, str], Tensor]:
    """Store kept entries as masks and one value stream: projections in order, row by row, column by column."""
    projections = tuple(rows)
    stored = {(projection, MASK): pack_mask(keep[projection]) for projection in projections}
    values = torch.cat([rows[projection][keep[projection]] for projection in projections])
    return {**stored, (projections[0], VALUES): values.to(dtype)}


def decode_bitmap(projections: tuple[Projection, ...], stored: Stored, hidden_size: int) -> Rows:
    """Inverse of ``encode_bitmap``, fp32; absent entries are zero.

    Raises:
        FormatError: the masks and the value count disagree.
    """
    values = stored[projections[0], VALUES]
    keep = {projection: unpack_mask(stored[projection, MASK], hidden_size) for projection in projections}
    counts = [int(keep[projection].sum()) for projection in projections]
    if sum(counts) != values.numel():
        raise FormatError(f"masks keep {sum(counts)} values, {values.numel()} are stored")
    rows: Rows = {}
    for projection, part in zip(projections, values.float().split(counts), strict=True):
        rows[projection] = torch.zeros(keep[projection].shape, device=values.device).masked_scatter_(
            keep[projection], part
        )
    return rows


def decode_low_rank(projections: tuple[Projection, ...], stored: Stored) -> Rows:
    """``U @ V`` for each projection, fp32."""
    left = stored[projections[0], U].float()
    return {projection: left @ stored[projection, V].float() for projection in projections}


def decode_residual(layer: LayerSpec, stored: Stored, hidden_size: int) -> Rows:
    """Sum of the residual's parts, fp32 ``[I, H]`` for each projection."""
    total: Rows = {}
    for part in layer.residual:
        if part.method == "bitmap":
            rows = decode_bitmap(part.projections, stored, hidden_size)
        else:
            rows = decode_low_rank(part.projections, stored)
        for projection, value in rows.items():
            total[projection] = total[projection] + value if projection in total else value
    return total


def restore_center(layer: LayerSpec, shared: Stored) -> Rows:
    """The center that every expert of the layer shares, fp32 ``[I, H]`` for each projection; empty without one."""
    return {projection: shared[projection, CENTER].float() for part in layer.center for projection in part.projections}


def restore_expert(layer: LayerSpec, shared: Stored, stored: Stored, hidden_size: int) -> Rows:
    """Restored expert: center + decoded residual, added in fp32, in design-matrix orientation.

    Args:
        layer: the layer's spec.
        shared: the layer's shared tensors by (projection, suffix).
        stored: the expert's tensors by (projection, suffix).
        hidden_size: H.
    Returns:
        fp32 ``[I, H]`` for each projection.
    """
    rows = decode_residual(layer, stored, hidden_size)
    for projection, center in restore_center(layer, shared).items():
        rows[projection] = rows[projection] + center
    return rows
