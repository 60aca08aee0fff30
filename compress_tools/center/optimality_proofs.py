"""Prove that a guessed alignment is optimal, from a fraction of the products that solving would take.

Two proofs, both by potentials that are tight on the guessed pairs. The first looks at the center alone, once for all
experts: rows of the center that lie far apart, with every expert's row near its own, leave no other choice. What it
leaves open is looked at expert by expert.
"""

import torch
from torch import Tensor

from compress_tools.numerics.parallel import in_parallel
from compress_tools.numerics.products import product, row_blocks, row_products

_ROWS_AT_ONCE = 512
_EPS = 2.0**-24  # a sum of n fp32 terms errs by at most n * _EPS of the sum of their magnitudes
_SAMPLED_ROWS = 128
_SEPARATION_STEPS = 8  # shares of the columns that the first proof chooses from

# Columns of the design matrix that a bound may use, as shares; on sampled rows the cheapest is found, counting that
# the rows which it fails must be looked at with all columns.
_SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)

# A guess that costs more than this share of the whole product is not worth proving.
_MAX_COST = 7 / 8


# More rows of the center than this share left open by the first proof: the second begins anew.
_MAX_OPEN = 1 / 16


def rows_too_close(center: Tensor, reach: Tensor, workers: int) -> Tensor | None:
    """Rows of the center whose matches are not proved by the center's own distances.

    With ``d_i = |c_i - a_i|``, the potentials ``d_i^2 / 2`` on both sides are tight on the matched pairs, and feasible
    if ``|c_i - a_j|^2 >= (d_i^2 + d_j^2) / 2`` for every other pair. As ``|c_i - a_j| >= |c_i - c_j| - d_j``, it is
    enough that ``|c_i - c_j| >= max(d_i, d_j) + sqrt((d_i^2 + d_j^2) / 2)``: one condition for all experts, with the
    largest d of each row. Distances over some columns are lower bounds of distances; as many are taken as a
    sample of rows shows to be enough.

    Args:
        center: ``[I, D]`` fp32.
        reach: ``[I]`` fp32, each row's largest distance from the rows matched to it.
        workers: blocks of rows side by side.
    Returns:
        int64 rows, both of every pair that is not cleared; None if they are too many to be worth it.
    """
    order = _by_energy(center)
    sample = _sample(center)
    distance = torch.zeros(len(sample), len(center), device=center.device)
    reach = reach * (1 + 4 * len(order) * _EPS)  # its own rounding
    chosen, open_rows = None, sample
    for number, columns in enumerate(order.chunk(_SEPARATION_STEPS), 1):
        part = center[:, columns]
        distance += _distances_from_below(part, row_products(part, part), sample)
        open_rows = sample[_not_clear(distance, reach, sample).any(1)]
        if not len(open_rows):
            chosen = number
            break
    if chosen is None and len(open_rows) > _MAX_OPEN * len(sample):
        return None
    share = order if chosen is None else torch.cat(order.chunk(_SEPARATION_STEPS)[:chosen]).sort().values
    narrow = center if len(share) == len(order) else center[:, share]
    norms = row_products(narrow, narrow)

    def look(rows: Tensor) -> tuple[Tensor, Tensor]:
        # Pairs with earlier rows were seen from there.
        first = int(rows[0])
        below = _distances_from_below(narrow[first:], norms[first:], rows - first)
        bad = _not_clear(below, reach[first:], rows - first)
        return rows[bad.any(1)], bad.any(0).nonzero().flatten() + first

    every = torch.arange(len(center), device=center.device)
    found = in_parallel(look, torch.split(every, _ROWS_AT_ONCE), workers)
    left = torch.cat([part for pair in found for part in pair])
    left = left.bincount(minlength=len(center)).nonzero().flatten()  # each once, ascending
    return left if len(left) <= _MAX_OPEN * len(center) else None


def _distances_from_below(matrix: Tensor, norms: Tensor, rows: Tensor) -> Tensor:
    """Lower bounds of squared distances of ``rows`` [n] from all rows of a matrix [I, C]: fp32 ``[n, I]``."""
    below = product(matrix[rows], matrix.T).mul_(-2)
    rounding = 1 - 4 * matrix.shape[1] * _EPS
    return below.add_(rounding * norms).add_(rounding * norms[rows, None])


def _not_clear(distance: Tensor, reach: Tensor, rows: Tensor) -> Tensor:
    """Pairs of ``rows`` [n] with all rows that may be too close, by lower bounds of their squared distances [n, I]."""
    needed = (reach.square()[rows, None] + reach.square()).div_(2).sqrt_()
    needed += torch.maximum(reach[rows, None], reach)
    bad = distance < needed.square_()
    bad[torch.arange(len(rows), device=rows.device), rows] = False
    return bad


def _sample(center: Tensor) -> Tensor:
    """Rows, evenly spread."""
    return torch.linspace(0, len(center) - 1, min(len(center), _SAMPLED_ROWS), device=center.device).long()


def _by_energy(matrix: Tensor) -> Tensor:
    """Columns, those of most energy first: they bound best."""
    energy = torch.zeros(matrix.shape[1], device=matrix.device)
    for (rows,) in row_blocks(matrix):
        energy += rows.square().sum(0)
    return energy.argsort(descending=True)


def is_certainly_optimal(center: Tensor, aligned: Tensor, only: Tensor | None = None) -> bool:
    """Whether matching center row i to aligned row i is proved to be an optimal assignment.

    With the matched gains ``g_i = c_i . a_i``, the potentials ``g_i / 2`` on both sides are tight on the matched
    pairs, and feasible if ``c_i . a_j <= (g_i + g_j) / 2`` for every other pair; then no assignment gains more. It
    is the case where experts are noisy copies of each other. A product is bounded from above by some columns S
    alone, ``c_i . a_j <= c_i[S] . a_j[S] + |c_i[not S]| |a_j[not S]|`` (Cauchy-Schwarz): one product over |S| + 1
    columns. False means "not proved", not "not optimal".

    Args:
        center: ``[I, D]`` fp32.
        aligned: ``[I, D]`` fp32, same device.
        only: rows of the center to prove, when the others are proved.
    Returns:
        True only with a proof; rounding of the fp32 products counts against it.
    """
    if only is not None and not len(only):
        return True
    bounds = _Bounds(center, aligned)
    if only is not None:
        return bounds.clear(only)
    everything = torch.arange(len(center), device=center.device)
    sample = _sample(center)
    if bounds.failing(sample).numel():
        return False  # no share of the columns proves what all of them don't
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
    failing = torch.cat([bounds.failing(rows) for rows in torch.split(everything, _ROWS_AT_ONCE)])
    if failing.numel() > (_MAX_COST - best) * len(center):
        return False
    bounds.use_columns(1.0)
    return bounds.clear(failing)


class _Bounds:
    """Upper bounds of the products of center rows and aligned rows, by a share of the columns; at first by all."""

    def __init__(self, center: Tensor, aligned: Tensor) -> None:
        self._sides = (center, aligned)
        self._energy = tuple(row_products(side, side) for side in self._sides)
        self._matched = row_products(center, aligned)
        self._order = _by_energy(center)
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
            rest = (energy - row_products(part, part)).clamp(min=0) + rounding * energy
            sides.append(torch.cat([part, rest.sqrt()[:, None]], 1))
        self._left, self._right = sides

    def clear(self, rows: Tensor) -> bool:
        """Whether the bounds clear every pair of ``rows`` [n]."""
        return all(not self.failing(some).numel() for some in torch.split(rows, _ROWS_AT_ONCE))

    def failing(self, rows: Tensor) -> Tensor:
        """Those of ``rows`` [n] with some pair that the bounds do not clear."""
        if not rows.numel():
            return rows
        # Of the product here, and of the two matched gains.
        terms = self._left.shape[1] + len(self._order)
        slack = 2 * terms * _EPS * (self._energy[0][rows].max() * self._energy[1].max()).sqrt()
        room = (self._matched[rows, None] + self._matched[None, :]).div_(2).sub_(slack)
        room[torch.arange(len(rows), device=rows.device), rows] = torch.inf  # the matched pair itself
        return rows[(product(self._left[rows], self._right.T) > room).any(1)]
