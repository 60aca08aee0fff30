"""Low rank in the paper's joint form: one SVD of the design matrix, U shared by gate, up and down."""

import torch
from torch import Tensor

from compress_tools.design_matrix import design_to_rows
from compress_tools.format.schema import LowRankResidual, Projection
from compress_tools.format.tensors import U, V
from compress_tools.residuals.base import StoredTensors
from compress_tools.residuals.budget import affordable_rank


def left_singular_vectors(matrix: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading left singular vectors, from the Gram matrix in float64.

    Args:
        matrix: ``[I, D]`` fp32.
        rank: 1..min(I, D).
    Returns:
        ``[I, rank]`` fp32, orthonormal columns, largest singular value first.
    """
    num_rows, num_columns = matrix.shape
    if num_rows <= num_columns:
        _, vectors = torch.linalg.eigh(_gram(matrix))
        return vectors[:, -rank:].flip(1).float()
    # The smaller Gram matrix gives right vectors v; u = M v / |M v|. Null directions are completed by QR.
    _, vectors = torch.linalg.eigh(_gram(matrix.T))
    left, _ = torch.linalg.qr(matrix.double() @ vectors[:, -rank:].flip(1))
    return left.float()


def _gram(matrix: Tensor) -> Tensor:
    """``M M^T`` in float64, summed over column blocks so that no float64 copy of M exists."""
    total = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
    for block in matrix.split(2048, dim=1):
        wide = block.double()
        total += wide @ wide.T
    return total


class LowRank:
    """``--method low-rank``."""

    name = "low-rank"

    def spec(
        self, projections: tuple[Projection, ...], num_rows: int, num_columns: int, retain_ratio: float
    ) -> LowRankResidual:
        """See ``ResidualMethod.spec``."""
        return LowRankResidual(projections=projections, rank=affordable_rank(num_rows, num_columns, retain_ratio))

    def encode(self, residual: Tensor, part: LowRankResidual, dtype: torch.dtype, seed: int) -> StoredTensors:
        """See ``ResidualMethod.encode``. V is the least-squares fit to U as rounded."""
        left = left_singular_vectors(residual, part.rank).to(dtype).contiguous()
        wide = left.float()
        right = torch.linalg.solve(wide.T @ wide, wide.T @ residual)  # [R, P*H]
        stored: StoredTensors = {(part.projections[0], U): left.cpu()}
        for projection, rows in design_to_rows(right.to(dtype).cpu(), part.projections).items():
            stored[projection, V] = rows.contiguous()
        return stored
