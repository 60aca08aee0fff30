"""The residual methods by their CLI name, and what codes a whole layer spec. A new method is one file and one line."""

import torch
from torch import Tensor

from compress_tools.design_matrix import design_to_rows
from compress_tools.format.schema import LayerSpec
from compress_tools.format.tensors import CENTER
from compress_tools.residuals.base import ResidualMethod, StoredTensors
from compress_tools.residuals.low_rank import LowRank
from compress_tools.residuals.prune import Prune

METHODS: dict[str, ResidualMethod] = {method.name: method for method in (Prune(), LowRank())}
_BY_PART = {"bitmap": METHODS["prune"], "low_rank": METHODS["low-rank"]}


def encode_center(spec: LayerSpec, center: Tensor, dtype: torch.dtype) -> StoredTensors:
    """The center as stored.

    Args:
        spec: the layer's spec; its center parts cover every projection.
        center: ``[I, D]`` fp32, columns in design-matrix order.
        dtype: stored dtype.
    Returns:
        stored tensors by (projection, suffix), on the CPU.
    """
    projections = tuple(projection for part in spec.center for projection in part.projections)
    rows = design_to_rows(center.to(dtype).cpu(), projections)
    return {(projection, CENTER): rows[projection].contiguous() for projection in projections}


def encode_residual(spec: LayerSpec, residual: Tensor, dtype: torch.dtype, seed: int) -> StoredTensors:
    """One expert's residual, coded by the layer's single part.

    Args:
        spec: the layer's spec.
        residual: ``[I, D]`` fp32, columns in design-matrix order.
        dtype: dtype of stored values or factors.
        seed: seed of randomised steps.
    Returns:
        stored tensors by (projection, suffix), on the CPU.
    """
    (part,) = spec.residual
    return _BY_PART[part.method].encode(residual, part, dtype, seed)
