"""Whether a center could pay for a layer: decided on some of its rows, before all experts are aligned for hours.

The fixed point that finds a center is run for a few of the center's rows, over all rows of all experts. Two things
make it hopeful: rows are taken by cosine, so that two rows of a center may take the same row of an expert, and a margin
is taken off what it finds. The shares of energy that residuals would hold are then put through the planner's own
arithmetic: a coder loses the same share of a residual's energy that it lost of the weights', a center takes its bytes,
and the best that the layer could do with a center is compared with the best without.

What this leaves out: residuals that are easier to code than weights are, such as those of low rank or with few entries,
around a center that all experts share little of. Where a center holds much of the energy it is found out whatever its
residuals look like.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress_tools.numerics.parallel import in_parallel
from compress_tools.numerics.products import product
from compress_tools.numerics.sampling import spaced
from compress_tools.planner.candidates import CenterBits, Coder
from compress_tools.planner.choices import Choice, Groups, Rated
from compress_tools.planner.frontier import Frontier
from compress_tools.planner.measure import LayerMeasurement

# Multiplications of one matching of all experts up to which aligning takes seconds: nothing is decided beforehand.
ALIGNED_AT_ONCE = 10**10

# Rows of a center that are looked for, from either start, and how often.
ROWS = 32
ROUNDS = 3
# Taken off the share of energy that a center's residuals hold, beside two standard errors: what further rounds find.
MARGIN = 0.01
# A center is looked for where it could save this share of the error.
WORTH = 0.02
# Bytes at which the two are compared, relative to what each layer had if all had the same. What a center gains hardly
# depends on the rate, but for the steps between the coders' rates; those around the budget are the ones that matter.
LEAST_BYTES, MOST_BYTES = 0.97, 1.03

_ROWS_AT_ONCE = 2048
_TINY = 1e-30


def aligns_quickly(design: Tensor) -> bool:
    """Whether aligning all experts takes so little that nothing needs to be decided beforehand."""
    experts, rows, columns = design.shape
    return experts * rows * rows * columns <= ALIGNED_AT_ONCE


def skipped_text(shares: Tensor) -> str:
    """For log and plan, where no center is looked for."""
    return (
        f"no center was looked for: {ROWS} rows of it show that experts share at most {1 - float(shares.mean()):.1%} "
        "of their energy, which does not pay for its bytes"
    )


def hopeful_shares(design: Tensor, projections: int, workers: int) -> Tensor:
    """Share of each projection's energy that residuals of the best center would hold, or less: float64 ``[P]``.

    Args:
        design: design matrices ``[E, I, P*H]``.
        projections: P.
        workers: experts side by side; the result does not depend on them.
    """
    experts, rows = design.shape[:2]
    picked = torch.tensor(spaced(list(range(rows)), ROWS), device=design.device)
    norms = in_parallel(lambda expert: _norms(design[expert]), range(experts), workers)
    same = torch.zeros(len(picked), design.shape[2], device=design.device)
    for expert in range(experts):
        same += design[expert][picked]
    center = torch.cat([design[0][picked].float(), same / experts])
    best = torch.ones(projections, dtype=torch.float64)
    for _ in range(ROUNDS):
        sums = torch.zeros_like(center)
        energies = torch.zeros(len(center), projections, dtype=torch.float64)
        for batch in _batches(experts, workers):
            # One batch of rows in memory at a time, summed in the order of the experts.
            for found in in_parallel(partial(_nearest, design, norms, center), batch, workers):
                sums += found
                energies += _energies(found, projections)
        center = sums / experts
        held = experts * _energies(center, projections)
        for start in (slice(0, len(picked)), slice(len(picked), None)):
            shares = _least_share(energies[start] - held[start], energies[start])
            best = min(best, shares, key=lambda each: float(each.mean()))
    return (best - MARGIN).clamp(min=0)


def _least_share(residuals: Tensor, energies: Tensor) -> Tensor:
    """Of all rows by those looked at ``[R, P]``, less two standard errors of that estimate: ``[P]``."""
    whole = energies.sum(0).clamp_min(_TINY)
    share = residuals.sum(0) / whole
    return share - 2 * (residuals - share * energies).square().sum(0).sqrt() / whole


def _batches(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _norms(expert: Tensor) -> Tensor:
    """fp32 ``[I]``, none of them 0."""
    parts = [part.float().norm(dim=1) for part in expert.split(_ROWS_AT_ONCE)]
    return torch.cat(parts).clamp_min(_TINY)


def _nearest(design: Tensor, norms: list[Tensor], center: Tensor, expert: int) -> Tensor:
    """Of an expert's rows the one of largest cosine with each center row: fp32 ``[R, D]``."""
    own = design[expert]
    best = torch.full((len(center),), -torch.inf, device=center.device)
    chosen = torch.zeros(len(center), dtype=torch.int64, device=center.device)
    for start in range(0, len(own), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        cosine = product(center, own[part].float().T) / norms[expert][part]
        found = cosine.max(1)
        better = found.values > best
        best = torch.where(better, found.values, best)
        chosen = torch.where(better, found.indices + start, chosen)
    return own[chosen].float()


def _energies(rows: Tensor, projections: int) -> Tensor:
    """Of each row in each projection, float64 ``[R, P]`` on the CPU."""
    squares = rows.square().reshape(len(rows), projections, -1)
    return squares.sum(-1, dtype=torch.float64).cpu()


def could_pay(
    without: Rated,
    coders: tuple[Coder, ...],
    shares: Tensor,
    groups: Groups,
    dense_bytes: int,
    layer_budget: float,
) -> bool:
    """Whether the best choice with a center could lose ``WORTH`` less than the best one without.

    Convex hulls are compared: layers are planned together, and make up for each other's steps.

    Args:
        without: candidates without a center, as measured.
        coders: the menu.
        shares: ``hopeful_shares``.
        groups: of experts that are coded alike.
        dense_bytes: of the layer as it is.
        layer_budget: bytes of the layer if all had the same, within its bounds.
    """
    hopeful = replace(without, measured=_with_centers(without.measured, coders, shares))
    best, other = (_hull(rated.choices(groups, dense_bytes)) for rated in (hopeful, without))
    # Between corners of two polygons their ratio is monotone: it is least at one of them, or at an end.
    low = max(LEAST_BYTES * layer_budget, other[0][0])
    high = max(MOST_BYTES * layer_budget, low)
    places = np.concatenate([[low, high], best[0], other[0]]).clip(low, high)
    reached, had = np.interp(places, *best), np.interp(places, *other)
    return bool((reached < (1 - WORTH) * had).any())


def _with_centers(measured: LayerMeasurement, coders: tuple[Coder, ...], shares: Tensor) -> LayerMeasurement:
    """What is measured without a center, and what it lets expect with one."""
    alone = {coder.config: errors for (_, coder), errors in measured.errors.items() if not coder.joint}
    expected = {
        (bits, coder): alone[coder.config] * shares
        for coder in coders
        for bits in coder.centers
        if bits and not coder.joint and coder.config in alone
    }
    centers: set[CenterBits] = {bits for bits, _ in expected}
    residuals = dict.fromkeys(sorted(centers), measured.energies * shares)
    return replace(measured, errors=measured.errors | expected, residuals=measured.residuals | residuals)


def _hull(choices: Frontier[Choice | None]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The lower convex hull of a frontier: bytes and errors of its corners."""
    corners: list[tuple[float, float]] = []
    for x, y in zip(choices.nbytes.tolist(), choices.errors.tolist(), strict=True):
        while len(corners) > 1 and _lies_above(corners[-1], corners[-2], (x, y)):
            corners.pop()
        corners.append((x, y))
    return np.array([x for x, _ in corners]), np.array([y for _, y in corners])


def _lies_above(middle: tuple[float, float], left: tuple[float, float], right: tuple[float, float]) -> bool:
    return (middle[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (middle[0] - left[0])
