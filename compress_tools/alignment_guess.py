"""Prove that a guessed alignment is optimal, from a fraction of the products that solving would take."""

import torch
from torch import Tensor

_ROWS_AT_ONCE = 512
_EPS = 2.0**-24  # a sum of n fp32 terms errs by at most n * _EPS of the sum of their magnitudes
_SAMPLED_ROWS = 128

# Columns of the design matrix that a bound may use, as shares; on sampled rows the cheapest is found, counting that
# the rows which it fails must be looked at with all columns.
_SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)

# A guess that costs more than this share of the whole product is not worth proving.
_MAX_COST = 7 / 8


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
    best, cost = None, _MAX_COST
    for share in _SHARES:
        if share >= cost:
            break
        bounds.use_columns(share)
        if (found := share + len(bounds.failing(sample)) / len(sample)) < cost:
            best, cost = share, found
    if best is None:
        return False
    bounds.use_columns(best)
    failing = torch.cat([bounds.failing(rows) for rows in everything.split(_ROWS_AT_ONCE)])
    if failing.numel() > (_MAX_COST - best) * len(center):
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
        self._order = sum(rows.square().sum(0) for rows in center.split(_ROWS_AT_ONCE)).argsort(descending=True)
        self._left, self._right = self._sides

    def use_columns(self, share: float) -> None:
        """Bound by the leading ``share`` of the columns, and one more column for the norm of what is left."""
        if share == 1.0:
            self._left, self._right = self._sides
            return
        chosen = self._order[: max(1, int(share * len(self._order)))].sort().values
        # Rounding of both sums is added to what is left, so that it stays an upper bound.
        rounding = 2 * len(self._order) * _EPS
        sides = []
        for side, energy in zip(self._sides, self._energy, strict=True):
            part = side[:, chosen]
            rest = (energy - _row_sums(part, part)).clamp(min=0) + rounding * energy
            sides.append(torch.cat([part, rest.sqrt()[:, None]], 1))
        self._left, self._right = sides

    def failing(self, rows: Tensor) -> Tensor:
        """Those of ``rows`` [n] with some pair that the bounds do not clear."""
        if not rows.numel():
            return rows
        # Of the product here, and of the two matched gains.
        terms = self._left.shape[1] + len(self._order)
        slack = 2 * terms * _EPS * (self._energy[0][rows].max() * self._energy[1].max()).sqrt()
        room = (self._matched[rows, None] + self._matched[None, :]).div_(2).sub_(slack)
        room[torch.arange(len(rows), device=rows.device), rows] = torch.inf  # the matched pair itself
        return rows[((self._left[rows] @ self._right.T) > room).any(1)]


def _row_sums(left: Tensor, right: Tensor) -> Tensor:
    """``sum_c left[i, c] * right[i, c]``: ``[n, D]`` twice to ``[n]``, fp32, by blocks of rows."""
    pairs = zip(left.split(_ROWS_AT_ONCE), right.split(_ROWS_AT_ONCE), strict=True)
    return torch.cat([(a * b).sum(1) for a, b in pairs])
