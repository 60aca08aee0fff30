"""Low rank: one SVD for all projections with U shared (the paper's joint form), or one for each projection."""

import torch
from torch import Tensor

from compress_tools.design_matrix import design_to_rows
from compress_tools.format.codec import restore_left_factor
from compress_tools.format.schema import LowRankResidual
from compress_tools.format.tensors import U_CODES, U_SCALES, V_CODES, V_SCALES, U, V
from compress_tools.residuals.base import StoredTensors
from compress_tools.residuals.quantize import pack_rows


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
    """Part ``low_rank``: U shared by the part's projections (all: the paper's joint form), or one part for each."""

    method = "low_rank"

    def encode(self, residual: Tensor, part: LowRankResidual, dtype: torch.dtype, seed: int) -> StoredTensors:
        """See ``ResidualCoder.encode``. V is the least-squares fit to U as stored."""
        first = part.projections[0]
        stored: StoredTensors = {}
        left = left_singular_vectors(residual, part.rank)
        if part.factor_bits is None:
            stored[first, U] = left.to(dtype).contiguous().cpu()
        else:
            stored[first, U_CODES], stored[first, U_SCALES] = pack_rows(left, part.factor_bits, None)
        wide = restore_left_factor(part, stored).to(residual.device)
        right = torch.linalg.solve(wide.T @ wide, wide.T @ residual)  # [R, P*H]
        for projection, rows in design_to_rows(right, part.projections).items():
            if part.factor_bits is None:
                stored[projection, V] = rows.to(dtype).contiguous().cpu()
            else:
                codes, scales = pack_rows(rows, part.factor_bits, None)
                stored[projection, V_CODES], stored[projection, V_SCALES] = codes, scales
        return stored
