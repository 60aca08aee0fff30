"""The center: free-support Wasserstein barycenter of the experts' row clouds (arXiv:2503.06881, sec. 4.2).

Uniform masses and as many support points as rows make every transport plan a permutation. Departures from the
paper's scripts: the fixed point starts from expert 0 and from the mean, and the better result is kept; every
assignment is exact.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress_tools.center.alignment import Start, align_experts
from compress_tools.errors import NumericalError
from compress_tools.numerics.parallel import in_parallel
from compress_tools.numerics.products import squared_distance, squared_norm
from compress_tools.numerics.work import Work

_ROWS_AT_ONCE = 512

# Share of the experts' energy by which fp32 inner products may misjudge the distances of an alignment: some units in
# the last place (6e-8) for each of the four products that exchanging two rows compares.
_PRODUCT_ROUNDING = 1e-6

CenterKind = Literal["barycenter", "git-rebasin", "mean", "none"]


@dataclass(frozen=True)
class CenterOptions:
    """Which center, and when its iterations stop.

    Attributes:
        kind: ``barycenter``; or, for comparison: ``git-rebasin`` (every expert matched to expert 0 once, then the
            mean: weight matching of arXiv:2209.04836 for one hidden layer), ``mean`` (no alignment), ``none``.
        max_iterations: most iterations of each start of the barycenter.
        tolerance: it stops once an iteration lowers the objective by less than this share.
    """

    kind: CenterKind = "barycenter"
    max_iterations: int = 25
    tolerance: float = 1e-4


@dataclass(frozen=True)
class CenterResult:
    """A center and the alignment it was made with.

    Attributes:
        center: ``[I, D]`` fp32; None for no center.
        perm: ``[E, I]`` int64, with ``aligned[e] = design[e][perm[e]]``.
        objective: sum over experts of squared distances to the center after each iteration; falls.
        start: which start won: ``expert 0``, ``mean``, or empty.
        gap: largest certified relative duality gap of the assignments behind ``perm``.
    """

    center: Tensor | None
    perm: Tensor
    objective: list[float]
    start: str = ""
    gap: float = 0.0


def identity_perm(num_experts: int, num_rows: int) -> Tensor:
    """``[E, I]`` int64: every expert keeps its row order."""
    return torch.arange(num_rows).expand(num_experts, num_rows).clone()


def mean_of_aligned(design: Tensor, perm: Tensor, workers: int = 1) -> Tensor:
    """Mean of the aligned experts, ``[I, D]`` fp32; summed in fp32, in the order of the experts."""
    total = torch.zeros(design.shape[1:], dtype=torch.float32, device=design.device)
    perm = perm.to(design.device)

    def add(rows: slice) -> None:
        for expert, order in enumerate(perm):
            total[rows] += design[expert][order[rows]]

    in_parallel(add, [slice(start, start + _ROWS_AT_ONCE) for start in range(0, len(total), _ROWS_AT_ONCE)], workers)
    return total / len(design)


def spread(design: Tensor, perm: Tensor, center: Tensor, workers: int = 1) -> float:
    """Sum over experts of squared distances between aligned rows and center rows, float64."""

    def distance(expert: int) -> float:
        return squared_distance(design[expert][perm[expert].to(design.device)], center)

    return sum(in_parallel(distance, range(len(design)), workers))


def barycenter(design: Tensor, options: CenterOptions | None = None, work: Work | None = None) -> CenterResult:
    """Fixed point: align every expert to the center, set the center to the mean of the aligned, repeat.

    Args:
        design: design matrices ``[E, I, D]``, any float dtype; arithmetic in fp32.
        options: when to stop.
        work: a step for each assignment; seconds of "cost matrix", "assignment" and "center".
    Returns:
        the better of the two starts; ``objective`` is ``sum_k ||T_k W_k - center||_F^2``.
    Raises:
        NumericalError: a cost is not finite, or the objective rises by more than rounding explains.
    """
    options, work = options or CenterOptions(), work or Work()
    identity = identity_perm(len(design), design.shape[1])
    first = _fixed_point(design, design[0].float(), "expert 0", options, work)
    if torch.equal(first.perm, identity):
        return first  # its center is the mean: the second start would begin where the first one ended
    second = _fixed_point(design, mean_of_aligned(design, identity, work.workers), "mean", options, work)
    return min(first, second, key=lambda result: result.objective[-1])


def _fixed_point(design: Tensor, center: Tensor, start: str, options: CenterOptions, work: Work) -> CenterResult:
    objective: list[float] = []
    perm, proof, gap = identity_perm(len(design), design.shape[1]), None, 0.0
    for _ in range(options.max_iterations):
        alignment = align_experts(design, center, Start(perm, proof), work)
        if objective and torch.equal(alignment.perm, perm):
            gap = alignment.gap.max().item()
            break
        with work.clock.stage("center"):
            new_center = mean_of_aligned(design, alignment.perm, work.workers)
            value = spread(design, alignment.perm, new_center, work.workers)
        if objective and value > objective[-1] * (1 + 1e-6) + 1e-12 and not _is_rounding(value - objective[-1], design):
            raise NumericalError(f"barycenter objective rose from {objective[-1]} to {value}")
        if objective and value >= objective[-1]:
            break
        previous = objective[-1] if objective else None
        perm, center, proof, gap = alignment.perm, new_center, alignment.proof, alignment.gap.max().item()
        objective.append(value)
        if value == 0 or (previous is not None and previous - value < options.tolerance * previous):
            break
    return CenterResult(center, perm, objective, start, gap)


def _is_rounding(rise: float, design: Tensor) -> bool:
    """Whether fp32 products explain a rise: their errors are relative to the rows, which near copies lie far below."""
    return rise <= _PRODUCT_ROUNDING * sum(map(squared_norm, design))


def find_center(design: Tensor, options: CenterOptions, work: Work | None = None) -> CenterResult:
    """The center of the asked kind, and the row order that goes with it; see ``barycenter`` for arguments."""
    work = work or Work()
    if options.kind == "barycenter":
        return barycenter(design, options, work)
    perm, gap = identity_perm(len(design), design.shape[1]), 0.0
    if options.kind == "none":
        with work.clock.stage("center"):
            return CenterResult(None, perm, [sum(in_parallel(squared_norm, design, work.workers))])
    if options.kind == "git-rebasin":
        alignment = align_experts(design, design[0].float(), Start(perm), work)
        perm, gap = alignment.perm, alignment.gap.max().item()
    with work.clock.stage("center"):
        center = mean_of_aligned(design, perm, work.workers)
        return CenterResult(center, perm, [spread(design, perm, center, work.workers)], gap=gap)
