"""Low rank: one SVD for all projections with U shared (the paper's joint form), or one for each projection."""

import torch
from torch import Tensor

from compress_tools.config import CompressionConfig
from compress_tools.format.parts.base import Projection, StoredTensors
from compress_tools.format.parts.low_rank import CODED_U, CODED_V, LowRankResidual, U, V
from compress_tools.numerics.products import product
from compress_tools.residuals.budget import affordable_rank
from compress_tools.residuals.quantize import pack_rows
from compress_tools.residuals.svd import left_singular_vectors
from compress_tools.source.design_matrix import design_to_rows


def low_rank_parts(
    config: CompressionConfig, projections: tuple[Projection, ...], rows: int, columns: int
) -> tuple[LowRankResidual, ...]:
    """See ``Recipe``."""
    shared_by = [projections] if config.low_rank_form == "joint" else [(projection,) for projection in projections]
    return tuple(
        LowRankResidual(
            projections=group,
            rank=affordable_rank(rows, len(group) * columns, config.retain_ratio),
            factor_bits=None if config.factor_bits == 16 else config.factor_bits,
        )
        for group in shared_by
    )


def factorise(rows: Tensor, part: LowRankResidual, dtype: torch.dtype, seed: int) -> StoredTensors:
    """See ``Encoder``. U is shared by the part's projections; V is the least-squares fit to U as stored."""
    first = part.projections[0]
    stored: StoredTensors = {}
    left = left_singular_vectors(rows, part.rank, seed)
    if part.factor_bits is None:
        stored[first, U] = left.to(dtype).contiguous().cpu()
    else:
        stored |= pack_rows(CODED_U, first, left, part.factor_bits)
    wide = part.left_factor(stored).to(rows.device)
    right = torch.linalg.solve(product(wide.T, wide), product(wide.T, rows))  # [R, P*H]
    for projection, own in design_to_rows(right, part.projections).items():
        if part.factor_bits is None:
            stored[projection, V] = own.to(dtype).contiguous().cpu()
        else:
            stored |= pack_rows(CODED_V, projection, own, part.factor_bits)
    return stored
