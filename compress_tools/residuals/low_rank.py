"""Low rank: one SVD for all projections with U shared (the paper's joint form), or one for each projection."""

import torch
from torch import Tensor

from compress_tools.format.codec import restore_left_factor
from compress_tools.format.schema import LowRankResidual
from compress_tools.format.tensors import U_CODES, U_SCALES, V_CODES, V_SCALES, U, V
from compress_tools.numerics.products import product
from compress_tools.residuals.base import StoredTensors
from compress_tools.residuals.quantize import pack_rows
from compress_tools.residuals.svd import left_singular_vectors
from compress_tools.source.design_matrix import design_to_rows


class LowRank:
    """Part ``low_rank``: U shared by the part's projections (all: the paper's joint form), or one part for each."""

    method = "low_rank"

    def encode(self, residual: Tensor, part: LowRankResidual, dtype: torch.dtype, seed: int) -> StoredTensors:
        """See ``ResidualCoder.encode``. V is the least-squares fit to U as stored."""
        first = part.projections[0]
        stored: StoredTensors = {}
        left = left_singular_vectors(residual, part.rank, seed)
        if part.factor_bits is None:
            stored[first, U] = left.to(dtype).contiguous().cpu()
        else:
            stored[first, U_CODES], stored[first, U_SCALES] = pack_rows(left, part.factor_bits, None)
        wide = restore_left_factor(part, stored).to(residual.device)
        right = torch.linalg.solve(product(wide.T, wide), product(wide.T, residual))  # [R, P*H]
        for projection, rows in design_to_rows(right, part.projections).items():
            if part.factor_bits is None:
                stored[projection, V] = rows.to(dtype).contiguous().cpu()
            else:
                codes, scales = pack_rows(rows, part.factor_bits, None)
                stored[projection, V_CODES], stored[projection, V_SCALES] = codes, scales
        return stored
