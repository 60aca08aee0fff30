"""Prove that a guessed alignment is optimal, from a fraction of the products that solving would take."""

import torch
from torch import Tensor

_ROWS_AT_ONCE = 512
_SAMPLED_ROWS = 128

# Columns of the design matrix that a bound may use, as shares; the smallest that holds on sampled rows is taken.
_SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)

# Rows whose cheap bound fails are looked at with all columns; more of them than this share, and solving is cheaper.
_MAX_EXACT_SHARE = 1 / 8


def is_certainly_optimal(center: Tensor, aligned: Tensor) -> bool:
    """Whether matching center row i to aligned row i is proved to be an optimal assignment.

    With the matched gains ``g_i = c_i . a_i``, the potentials ``g_i / 2`` on both sides are tight on the matched
    pairs, and feasible if ``c_i . a_j <= (g_i + g_j) / 2`` for every other pair; then no assignment gains more. It
    is the case where experts are noisy copies of each other. A product is bounded from above by some columns S
    alone, ``c_i . a_j <= c_i[S] . a_j[S] + |c_i[not S]| |a_j[not S]|`` (Cauchy-Schwarz): one product over |S| + 1
    columns. False means "not proved", not "not optimal".

    Args:
        center: ``[I, D]`` fp32.
        aligned: ``[I, D]`` fp32, same device.
    Returns:
        True only with a proof; rounding of the fp32 products counts against it.
    """
    bounds = _Bounds(center, aligned)
    everything = torch.arange(len(center), device=center.device)
    sample = torch.linspace(0, len(center) - 1, min(len(center), _SAMPLED_ROWS), device=center.device).long()
    for share in _SHARES:
        bounds.use_columns(share)
        if not bounds.failing(sample).numel():
            break
    else:
        return False
    failing = torch.cat([bounds.failing(rows) for rows in everything.split(_ROWS_AT_ONCE)])
    if failing.numel() > _MAX_EXACT_SHARE * len(center):
        return False
    bounds.use_columns(1.0)
    return all(not bounds.failing(rows).numel() for rows in failing.split(_ROWS_AT_ONCE))


class _Bounds:
    """Upper bounds of the products of center rows and aligned rows, by a share of the columns."""

    def __init__(self, center: Tensor, aligned: Tensor) -> None:
        self._sides = (center, aligned)
        self._energy = tuple(_row_sums(side, side) for side in self._sides)
        self._matched = _row_sums(center, aligned)
        # Columns of most energy first: they bound best.
        self._order = center.square().sum(0, dtype=torch.float64).argsort(descending=True)
        self._left, self._right = self._sides

    def use_columns(self, share: float) -> None:
        """Bound by the leading ``share`` of the columns, and one more column for the norm of what is left."""
        if share == 1.0:
            self._left, self._right = self._sides
            return
        chosen = self._order[: max(1, int(share * len(self._order)))]
        self._left, self._right = (
            torch.cat([part, (energy - _row_sums(part, part)).clamp(min=0).sqrt().float()[:, None]], 1)
            for part, energy in (
                (side[:, chosen], energy) for side, energy in zip(self._sides, self._energy, strict=True)
            )
        )

    def failing(self, rows: Tensor) -> Tensor:
        """Those of ``rows`` [n] with some pair that the bounds do not clear."""
        if not rows.numel():
            return rows
        # An fp32 dot product of n terms errs by at most n * 2^-24 * |c| |a|; twice that for the added norms.
        slack = 2 * self._left.shape[1] * 2**-24 * (self._energy[0][rows].max() * self._energy[1].max()).sqrt()
        room = ((self._matched[rows, None] + self._matched[None, :]) / 2 - slack).float()
        room[torch.arange(len(rows), device=rows.device), rows] = torch.inf  # the matched pair itself
        return rows[((self._left[rows] @ self._right.T) > room).any(1)]


def _row_sums(left: Tensor, right: Tensor) -> Tensor:
    """``sum_c left[i, c] * right[i, c]``: ``[n, D]`` twice to ``[n]``, products and sums in float64, by blocks."""
    pairs = zip(left.split(_ROWS_AT_ONCE), right.split(_ROWS_AT_ONCE), strict=True)
    return torch.cat([(a.double() * b.double()).sum(1) for a, b in pairs])
