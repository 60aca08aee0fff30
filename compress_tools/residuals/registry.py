"""The coders by the part they make, and what codes a whole layer spec. A new coder is one file and one line."""

import torch
from torch import Tensor

from compress_tools.format.codec import decode_part
from compress_tools.format.schema import PROJECTIONS, LayerSpec, Projection
from compress_tools.format.tensors import CENTER, CENTER_CODES, CENTER_SCALES
from compress_tools.residuals.base import ResidualCoder, StoredTensors
from compress_tools.residuals.low_rank import LowRank
from compress_tools.residuals.prune import Prune, PruneRows
from compress_tools.residuals.quantize import Quantize, pack_rows
from compress_tools.source.design_matrix import design_to_rows

CODERS: dict[str, ResidualCoder] = {coder.method: coder for coder in (Prune(), PruneRows(), LowRank(), Quantize())}


def encode_center(spec: LayerSpec, center: Tensor, dtype: torch.dtype) -> StoredTensors:
    """The center as stored, of the projections that have one.

    Args:
        spec: the layer's spec.
        center: ``[I, D]`` fp32, columns in design-matrix order.
        dtype: stored dtype of a dense center.
    Returns:
        stored tensors by (projection, suffix), on the CPU.
    """
    rows = design_to_rows(center, design_projections(spec))
    stored: StoredTensors = {}
    for part in spec.center:
        for projection in part.projections:
            if part.method == "dense":
                stored[projection, CENTER] = rows[projection].to(dtype).contiguous().cpu()
            else:
                codes, scales = pack_rows(rows[projection], part.bits, part.group_size)
                stored[projection, CENTER_CODES], stored[projection, CENTER_SCALES] = codes, scales
    return stored


def encode_residual(spec: LayerSpec, residual: Tensor, dtype: torch.dtype, seed: int) -> StoredTensors:
    """One expert's residual, coded part by part: each part codes what the earlier ones, as stored, left.

    Args:
        spec: the layer's spec as this expert is stored: ``LayerSpec.of_expert``.
        residual: ``[I, D]`` fp32, columns in design-matrix order; not changed.
        dtype: dtype of stored values or factors.
        seed: seed of randomised steps.
    Returns:
        stored tensors by (projection, suffix), on the CPU.
    """
    left = design_to_rows(residual, design_projections(spec))
    hidden_size = residual.shape[1] // len(left)
    stored: StoredTensors = {}
    for number, part in enumerate(spec.residual):
        whole = part.projections == tuple(left) and number == 0
        columns = residual if whole else torch.cat([left[projection] for projection in part.projections], 1)
        made = CODERS[part.method].encode(columns, part, dtype, seed)
        stored |= made
        if any(set(later.projections) & set(part.projections) for later in spec.residual[number + 1 :]):
            for projection, rows in decode_part(part, made, hidden_size).items():
                left[projection] = left[projection] - rows.to(residual.device)
    return stored


def design_projections(spec: LayerSpec) -> tuple[Projection, ...]:
    """The projections of a layer in the design matrix's order: those that its residuals cover."""
    parts = spec.residual or spec.groups[0].residual
    covered = {projection for part in parts for projection in part.projections}
    return tuple(projection for projection in PROJECTIONS if projection in covered)
