"""Magnitude pruning, unstructured over the whole design matrix (the paper's UP), stored as bitmap + values."""

import torch
from torch import Tensor

from compress_tools.design_matrix import design_to_rows
from compress_tools.format.codec import encode_bitmap
from compress_tools.format.schema import BitmapResidual, Projection
from compress_tools.residuals.base import StoredTensors
from compress_tools.residuals.budget import kept_values


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
    threshold = magnitude.kthvalue(magnitude.numel() - count + 1).values
    keep = magnitude > threshold
    ties = (magnitude == threshold).nonzero().flatten()
    keep[ties[: count - int(keep.sum())]] = True
    return keep.view(matrix.shape)


class Prune:
    """``--method prune``."""

    name = "prune"

    def spec(
        self, projections: tuple[Projection, ...], num_rows: int, num_columns: int, retain_ratio: float
    ) -> BitmapResidual:
        """See ``ResidualMethod.spec``."""
        return BitmapResidual(
            projections=projections, values_per_expert=kept_values(num_rows, num_columns, retain_ratio)
        )

    def encode(self, residual: Tensor, part: BitmapResidual, dtype: torch.dtype, seed: int) -> StoredTensors:
        """See ``ResidualMethod.encode``."""
        keep = largest_magnitudes(residual, part.values_per_expert).cpu()
        return encode_bitmap(
            design_to_rows(residual.cpu(), part.projections), design_to_rows(keep, part.projections), dtype
        )
