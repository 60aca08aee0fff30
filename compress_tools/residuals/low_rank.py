"""Low rank in the paper's joint form: one SVD of the design matrix, U shared by gate, up and down."""

import torch
from torch import Tensor

from compress_tools.design_matrix import design_to_rows
from compress_tools.format.schema import LowRankResidual, Projection
from compress_tools.format.tensors import U, V
from compress_tools.residuals.base import StoredTensors
from compress_tools.residuals.budget import affordable_rank
from compress_tools.svd import left_singular_vectors


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
        left = left_singular_vectors(residual, part.rank, seed).to(dtype).contiguous()
        wide = left.float()
        right = torch.linalg.solve(wide.T @ wide, wide.T @ residual)  # [R, P*H]
        stored: StoredTensors = {(part.projections[0], U): left.cpu()}
        for projection, rows in design_to_rows(right.to(dtype).cpu(), part.projections).items():
            stored[projection, V] = rows.contiguous()
        return stored
