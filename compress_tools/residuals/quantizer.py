"""Rows to codes and scales at least squared error, without data (SPEC.md, 4). Every coder that has codes uses this.

For each group of columns a grid of scales below the one that just reaches the largest magnitude is tried: clipping a
few columns pays for finer steps. The best is then refitted to the codes it gave, by least squares, a few times.
"""

import torch
from torch import Tensor

from compress_tools.format.dtypes import DTYPES
from compress_tools.format.parts.base import SCALE_DTYPE
from compress_tools.format.quantization import half_range
from compress_tools.format.row_sizes import num_groups

# Shares of the largest magnitude's scale. A gaussian row's optimum lies between its last for a whole row of 4096
# columns and its first for a group of 32; refitting covers what lies between two of them.
SHRINKS = {
    2: (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
    3: (0.9, 0.8, 0.7, 0.6, 0.5, 0.4),
    4: (0.95, 0.9, 0.8, 0.7, 0.6, 0.5),
    8: (0.97, 0.93, 0.88),
}
REFITS = 3
# Values fitted at a time: on a CPU what stays in its caches is 1.5 times as fast as a large chunk.
CHUNK_VALUES = {"cpu": 1 << 18, "cuda": 1 << 24}


def quantize_rows(
    matrix: Tensor,
    bits: int,
    group_size: int | None = None,
    keep: Tensor | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows.

    Args:
        matrix: ``[I, C]`` fp32, finite.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; None for the whole row.
        keep: bool ``[I, C]``: entries whose error counts; None for all. The codes of others mean nothing.
        columns: fp32 ``[C]``: what errors of each column count; None where all count alike.
    Returns:
        codes uint8 ``[I, C]``, not packed, and scales bfloat16 ``[I, num_groups(C, group_size)]``, on the
        matrix's device. A group of zeros has scale 0, which restores zeros whatever the codes.
    """
    rows, number = matrix.shape
    groups, width = num_groups(number, group_size), group_size or number
    counts = None if columns is None else grouped((columns / columns.mean()).to(matrix.device)[None], group_size)
    codes = torch.empty(rows, number, dtype=torch.uint8, device=matrix.device)
    scales = torch.empty(rows, groups, dtype=DTYPES[SCALE_DTYPE], device=matrix.device)
    for start in range(0, rows, step := max(1, CHUNK_VALUES[matrix.device.type] // (groups * width))):
        chunk = slice(start, start + step)
        values, mask = matrix[chunk], None
        if keep is not None:
            values, mask = values.masked_fill(~keep[chunk], 0), grouped(keep[chunk], group_size)
        elif groups * width != number:
            mask = grouped(torch.ones_like(values, dtype=torch.bool), group_size)
        in_groups = grouped(values, group_size)
        if counts is not None:
            mask = counts if mask is None else mask * counts
        fitted = fit_scales(in_groups, mask, bits)
        scales[chunk] = fitted
        levels = _levels(in_groups, _usable(fitted), bits)
        codes[chunk] = (levels + half_range(bits)).to(torch.uint8).flatten(1)[:, :number]
    return codes, scales


def fit_scales(groups: Tensor, keep: Tensor | None, bits: int) -> Tensor:
    """Scale of each group at least squared error; never worse than the largest magnitude's scale.

    Args:
        groups: ``[..., C]`` fp32, zero where not kept.
        keep: bool ``[..., C]``, or fp32 what each error counts; None for all alike.
        bits: 2, 3, 4 or 8.
    Returns:
        bfloat16 ``[...]``.
    """
    peak = groups.abs().amax(-1)
    # Errors are taken of values relative to the peak: squares of tiny residuals would underflow.
    relative = groups / peak.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    best = rounded_scales(peak / half_range(bits))
    error = _error(relative, keep, best, peak, bits)

    def offer(scale: Tensor) -> None:
        nonlocal best, error
        found = _error(relative, keep, scale, peak, bits)
        better = found < error
        best, error = torch.where(better, scale, best), torch.where(better, found, error)

    for shrink in SHRINKS[bits]:
        offer(rounded_scales(peak * (shrink / half_range(bits))))
    for _ in range(REFITS):
        levels = _levels(groups, _usable(best), bits)
        # closed form: the scale at least squared error for given levels
        if keep is None or keep.dtype == torch.bool:
            levels = levels if keep is None else levels.mul_(keep)
            share = (relative * levels).sum(-1) / levels.square().sum(-1).clamp_min(0.25)
        else:
            counted = levels * keep
            least = torch.finfo(torch.float32).tiny
            share = (relative * counted).sum(-1) / (levels * counted).sum(-1).clamp_min(least)
        offer(rounded_scales(peak * share))
    return best


def grouped(matrix: Tensor, group_size: int | None) -> Tensor:
    """``[I, C]`` to ``[I, groups, width]``, the last group filled up with zeros."""
    columns = matrix.shape[1]
    groups, width = num_groups(columns, group_size), group_size or columns
    return torch.nn.functional.pad(matrix, (0, groups * width - columns)).view(len(matrix), groups, width)


def rounded_scales(scale: Tensor) -> Tensor:
    """To the stored dtype; what is below its normal range becomes 0."""
    rounded = scale.to(DTYPES[SCALE_DTYPE])
    return rounded.masked_fill(rounded < torch.finfo(rounded.dtype).tiny, 0)


def _usable(scale: Tensor) -> Tensor:
    """A divisor: 1 in place of 0, whose levels are multiplied by 0 again."""
    return scale.float().masked_fill(scale == 0, 1).unsqueeze(-1)


def _levels(values: Tensor, divisor: Tensor, bits: int) -> Tensor:
    """Nearest level of each value, in units of the scale: halves, never zero."""
    limit = half_range(bits)
    return values.div(divisor).floor_().add_(0.5).clamp_(-limit, limit)


def _error(relative: Tensor, keep: Tensor | None, scale: Tensor, peak: Tensor, bits: int) -> Tensor:
    """Squared error of kept values, as a share of the squared peak."""
    share = (scale.float() / peak.clamp_min(torch.finfo(torch.float32).tiny)).unsqueeze(-1)
    levels = _levels(relative, share.masked_fill(share == 0, 1), bits)
    missed = levels.mul_(share).sub_(relative).square_()
    return (missed if keep is None else missed.mul_(keep)).sum(-1)
