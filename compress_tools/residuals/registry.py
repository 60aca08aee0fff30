"""The encoder of each part, and what codes a layer's center and residuals by them. A new coder is one row here."""

from typing import Any

import torch
from torch import Tensor

from compress_tools.format.parts.base import Part, Projection, Rows, StoredTensors
from compress_tools.format.schema import (
    BitmapResidual,
    DenseCenter,
    LayerSpec,
    LowRankResidual,
    QuantizedCenter,
    QuantizedResidual,
    RowBitmapResidual,
    TrellisCenter,
    TrellisResidual,
)
from compress_tools.importance import Importance
from compress_tools.residuals.base import Encoder
from compress_tools.residuals.dense import store_dense
from compress_tools.residuals.low_rank import factorise
from compress_tools.residuals.prune import prune, prune_rows
from compress_tools.residuals.quantize import quantize
from compress_tools.residuals.trellis import encode_trellis
from compress_tools.source.design_matrix import design_to_rows

# Any: each encoder takes its own part.
ENCODERS: dict[type[Part], Encoder[Any]] = {
    DenseCenter: store_dense,
    QuantizedCenter: quantize,
    BitmapResidual: prune,
    RowBitmapResidual: prune_rows,
    LowRankResidual: factorise,
    QuantizedResidual: quantize,
    TrellisCenter: encode_trellis,
    TrellisResidual: encode_trellis,
}


def encode_part(
    rows: Tensor, part: Part, dtype: torch.dtype, seed: int, importance: Importance | None = None
) -> StoredTensors:
    """One part's tensors, by its encoder; see ``Encoder``."""
    return ENCODERS[type(part)](rows, part, dtype, seed, importance)


def encode_center(
    spec: LayerSpec, center: Tensor, dtype: torch.dtype, seed: int = 0, importance: Importance | None = None
) -> StoredTensors:
    """The center as stored, of the projections that have one.

    Args:
        spec: the layer's spec.
        center: ``[I, D]`` fp32, columns in design-matrix order.
        dtype: stored dtype of a dense center.
        seed: seed of randomised steps.
        importance: what errors count; None where all count alike.
    Returns:
        stored tensors by (projection, suffix), on the CPU.
    """
    rows = design_to_rows(center, spec.projections)
    stored: StoredTensors = {}
    for part in spec.center:
        whole = part.projections == spec.projections
        stored |= encode_part(center if whole else _joined(rows, part.projections), part, dtype, seed, importance)
    return stored


def encode_residual(
    spec: LayerSpec, residual: Tensor, dtype: torch.dtype, seed: int, importance: Importance | None = None
) -> StoredTensors:
    """One expert's residual, coded part by part: each part codes what the earlier ones, as stored, left.

    Args:
        spec: the layer's spec as this expert is stored: ``LayerSpec.of_expert``.
        residual: ``[I, D]`` fp32, columns in design-matrix order; not changed.
        dtype: dtype of stored values or factors.
        seed: seed of randomised steps.
        importance: what errors count, in the order of the rows; None where all count alike.
    Returns:
        stored tensors by (projection, suffix), on the CPU.
    """
    left = design_to_rows(residual, spec.projections)
    hidden_size = residual.shape[1] // len(left)
    stored: StoredTensors = {}
    for number, part in enumerate(spec.residual):
        whole = part.projections == spec.projections and number == 0
        made = encode_part(residual if whole else _joined(left, part.projections), part, dtype, seed, importance)
        stored |= made
        if any(set(later.projections) & set(part.projections) for later in spec.residual[number + 1 :]):
            for projection, rows in part.decode(made, hidden_size).items():
                left[projection] = left[projection] - rows.to(residual.device)
    return stored


def _joined(rows: Rows, projections: tuple[Projection, ...]) -> Tensor:
    return torch.cat([rows[projection] for projection in projections], 1)
