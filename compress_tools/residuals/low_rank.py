"""Low rank: one SVD for all projections with U shared (the paper's joint form), or one for each projection."""

import torch
from torch import Tensor

from compress_tools.config import CompressionConfig
from compress_tools.format.parts.base import Projection, StoredTensors
from compress_tools.format.parts.low_rank import CODED_U, CODED_V, LowRankResidual, U, V
from compress_tools.importance import Importance
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


def factorise(
    rows: Tensor, part: LowRankResidual, dtype: torch.dtype, seed: int, importance: Importance | None = None
) -> StoredTensors:
    """See ``Encoder``. U is shared by the part's projections; V is the least-squares fit to U as stored."""
    first = part.projections[0]
    stored: StoredTensors = {}
    roots = None
    if importance is None:
        left = left_singular_vectors(rows, part.rank, seed)
    else:
        weighed, roots = _weighed(rows, part, importance)
        left = left_singular_vectors(weighed, part.rank, seed) / roots
    if part.factor_bits is None:
        stored[first, U] = left.to(dtype).contiguous().cpu()
    else:
        stored |= pack_rows(CODED_U, first, left, part.factor_bits)
    wide = part.left_factor(stored).to(rows.device)
    fitted = wide if roots is None else wide * roots.square()
    right = torch.linalg.solve(product(fitted.T, wide), product(fitted.T, rows))  # [R, P*H]
    for projection, own in design_to_rows(right, part.projections).items():
        if part.factor_bits is None:
            stored[projection, V] = own.to(dtype).contiguous().cpu()
        else:
            stored |= pack_rows(CODED_V, projection, own, part.factor_bits)
    return stored


def _weighed(rows: Tensor, part: LowRankResidual, importance: Importance) -> tuple[Tensor, Tensor]:
    """Rows times the roots of what they count, and of those the roots of rows ``[I, 1]``, which U is divided by.

    Exact for one projection. Of several, which share U, each row counts by its mean over them.
    """
    by_row = torch.stack([importance.rows[p] / importance.rows[p].mean() for p in part.projections]).mean(0)
    roots = by_row.sqrt().unsqueeze(1).to(rows.device)
    weighed = []
    for projection, own in design_to_rows(rows, part.projections).items():
        columns = importance.columns.get(projection, torch.ones(own.shape[1]))
        weighed.append(own * roots * (columns * importance.rows[projection].mean()).sqrt().to(rows.device))
    whole = torch.cat(weighed, 1)
    # Squares of small numbers would underflow.
    return whole / whole.abs().amax().clamp_min(torch.finfo(torch.float32).tiny), roots
