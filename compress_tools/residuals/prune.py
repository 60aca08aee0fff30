"""Magnitude pruning, stored as bitmap + values: unstructured over the group (the paper's UP), or equally many per row.

Equal counts give fixed strides, no row pointers and tensor-parallel slices of equal size. They cost 0.1 % of the error
on a gaussian residual, 2 % on a trained model, a fifth where row norms differ by a third (docs/notes/coders.md).
"""

import numpy as np
import torch
from torch import Tensor

from compress_tools.config import CompressionConfig
from compress_tools.format.packing import pack_codes
from compress_tools.format.parts.base import Projection, Rows, StoredTensors
from compress_tools.format.parts.bitmap import (
    ROW_VALUE_CODES,
    ROW_VALUES,
    VALUE_CODES,
    VALUE_SCALES,
    VALUES,
    BitmapResidual,
    RowBitmapResidual,
    encode_bitmap,
    encode_row_bitmap,
)
from compress_tools.importance import Importance
from compress_tools.residuals.budget import kept_per_row, kept_values
from compress_tools.residuals.quantizer import quantize_rows
from compress_tools.source.design_matrix import design_to_rows

_TIES_AT_ONCE = 1 << 24

# Values that estimate a quantile, and how many of them to either side of it bound the true one, almost always.
_SAMPLE = 1 << 16
_MARGIN = 1 << 10


def largest_magnitudes(matrix: Tensor, count: int) -> Tensor:
    """Mask of exactly ``count`` entries of largest magnitude; ties go to the lower row, then the lower column.

    Args:
        matrix: any shape.
        count: 1..numel.
    Returns:
        bool, matrix's shape.
    """
    magnitude = matrix.abs().flatten()
    if count == magnitude.numel():
        return torch.ones_like(matrix, dtype=torch.bool)
    threshold = _kth_largest(magnitude, count)
    keep = magnitude > threshold
    missing = count - int(keep.count_nonzero())
    for start in range(0, magnitude.numel(), _TIES_AT_ONCE):
        chunk = slice(start, start + _TIES_AT_ONCE)
        ties = (magnitude[chunk] == threshold).nonzero().flatten()[:missing]
        keep[chunk][ties] = True
        missing -= len(ties)
        if not missing:
            break
    return keep.view(matrix.shape)


def _kth_largest(magnitude: Tensor, count: int) -> Tensor:
    """The ``count``-th largest of ``[N]``; on a CPU numpy's selection takes a tenth of the time of torch's."""
    rank = magnitude.numel() - count
    if magnitude.device.type != "cpu":
        return magnitude.kthvalue(rank + 1).values
    values = magnitude.numpy()
    if len(values) > 16 * _SAMPLE:
        # Only what lies near the sample's own quantile is looked at, if the value sought turns out to be there.
        sample = np.sort(values[:: len(values) // _SAMPLE])
        near = rank / len(values) * len(sample)
        low, high = (sample[int(np.clip(near + side, 0, len(sample) - 1))] for side in (-_MARGIN, _MARGIN))
        below = int(np.count_nonzero(values < low))
        band = values[(values >= low) & (values <= high)]
        if below <= rank < below + len(band):
            values, rank = band, rank - below
    return torch.from_numpy(np.partition(values, rank)[rank : rank + 1])[0]


def largest_of_each_row(matrix: Tensor, count: int) -> Tensor:
    """Mask of exactly ``count`` entries of largest magnitude of each row; ties go to the lower column.

    Args:
        matrix: ``[I, C]``.
        count: 1..C.
    Returns:
        bool ``[I, C]``.
    """
    magnitude = matrix.abs()
    if count == matrix.shape[1]:
        return torch.ones_like(matrix, dtype=torch.bool)
    threshold = magnitude.kthvalue(matrix.shape[1] - count + 1, dim=1, keepdim=True).values
    keep = magnitude > threshold
    ties = magnitude == threshold
    return keep | ties & (ties.cumsum(1, dtype=torch.int32) <= count - keep.sum(1, keepdim=True))


def pruned_parts(
    config: CompressionConfig, projections: tuple[Projection, ...], rows: int, columns: int
) -> tuple[BitmapResidual | RowBitmapResidual, ...]:
    """See ``Recipe``."""
    value_bits = None if config.value_bits == 16 else config.value_bits
    group_size = None if value_bits is None else config.group_size or None
    if config.prune_rows == "equal":
        count = kept_per_row(columns, config.retain_ratio)
        return (
            RowBitmapResidual(
                projections=projections, values_per_row=count, value_bits=value_bits, group_size=group_size
            ),
        )
    count = kept_values(rows, len(projections) * columns, config.retain_ratio)
    return (
        BitmapResidual(projections=projections, values_per_expert=count, value_bits=value_bits, group_size=group_size),
    )


def prune(
    rows: Tensor, part: BitmapResidual, dtype: torch.dtype, _seed: int, importance: Importance | None = None
) -> StoredTensors:
    """See ``Encoder``."""
    own = design_to_rows(rows, part.projections)
    scores = rows
    if importance is not None:
        scores = torch.cat([importance.weighed(projection, matrix) for projection, matrix in own.items()], 1)
    keep = design_to_rows(largest_magnitudes(scores, part.values_per_expert), part.projections)
    if part.value_bits is None:
        return _on_cpu(encode_bitmap(own, keep, dtype))
    codes, scales = _coded_values(own, keep, part.value_bits, part.group_size, importance)
    stored = encode_bitmap(codes, keep, torch.uint8)
    stream = stored.pop((part.projections[0], VALUES))
    stored[part.projections[0], VALUE_CODES] = pack_codes(stream, part.value_bits)
    return _on_cpu(stored | scales)


def prune_rows(
    rows: Tensor, part: RowBitmapResidual, dtype: torch.dtype, _seed: int, importance: Importance | None = None
) -> StoredTensors:
    """See ``Encoder``."""
    own = design_to_rows(rows, part.projections)
    scores = own if importance is None else {p: importance.weighed(p, matrix) for p, matrix in own.items()}
    keep = {projection: largest_of_each_row(matrix, part.values_per_row) for projection, matrix in scores.items()}
    if part.value_bits is None:
        return _on_cpu(encode_row_bitmap(own, keep, dtype))
    codes, scales = _coded_values(own, keep, part.value_bits, part.group_size, importance)
    stored = encode_row_bitmap(codes, keep, torch.uint8)
    for projection in part.projections:
        values = stored.pop((projection, ROW_VALUES))
        stored[projection, ROW_VALUE_CODES] = pack_codes(values, part.value_bits)
    return _on_cpu(stored | scales)


def _coded_values(
    rows: Rows, keep: Rows, bits: int, group_size: int | None, importance: Importance | None
) -> tuple[Rows, StoredTensors]:
    """Codes ``[I, H]`` for each projection, and the scales as stored."""
    codes: Rows = {}
    scales: StoredTensors = {}
    for projection, own in rows.items():
        columns = None if importance is None else importance.columns.get(projection)
        codes[projection], scales[projection, VALUE_SCALES] = quantize_rows(
            own, bits, group_size, keep[projection], columns
        )
    return codes, scales


def _on_cpu(stored: StoredTensors) -> StoredTensors:
    return {key: tensor.cpu() for key, tensor in stored.items()}
