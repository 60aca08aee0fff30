"""Optimal assignment of a square matrix, and the certificate that it is optimal."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress_tools.errors import NumericalError

# POT's network simplex is the reference and quick enough below this many rows; lapx's Jonker-Volgenant above.
POT_MAX_ROWS = 256

# A relative duality gap above this: the assignment is solved again in float64, then swept to the end, then solved by
# the other solver, and only then refused.
MAX_GAP = 1e-6

# Values of a block of rows that sweeps look at together: their float64 copy stays in the cache.
_BLOCK = 1 << 18

Cost = NDArray[np.floating[Any]]
Columns = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Certificate:
    """Proof of how good an assignment is.

    Attributes:
        gap: upper bound of the optimum minus the assignment's value, in the unit of the gains; 0 up to rounding
            where the assignment is optimal.
        column_potential: ``[I]`` float64, feasible with ``row_potential``: their sums are nowhere below the gains.
        row_potential: ``[I]`` float64.
    """

    gap: float
    column_potential: Tensor
    row_potential: Tensor


def solve_assignment(cost: Cost) -> Columns:
    """Optimal assignment of a square cost matrix.

    Args:
        cost: ``[I, I]`` float32 or float64, finite; solved in its dtype.
    Returns:
        columns ``[I]`` int64: row i is matched to ``columns[i]``.
    """
    if len(cost) <= POT_MAX_ROWS:
        return solve_with_pot(cost)
    return solve_with_lapx(cost)


def solve_with_pot(cost: Cost) -> Columns:
    """POT's exact ``emd`` with uniform masses and no pivot cap; the plan is a permutation."""
    import ot

    size = len(cost)
    mass = np.ones(size)
    distance = cost.astype(np.float64)
    distance -= distance.min()  # emd takes distances: some negative costs are called infeasible
    plan, log = ot.emd(mass, mass, distance, numItermax=2**62, log=True)
    if log["warning"] is not None:
        raise NumericalError(f"POT emd did not reach the optimum on {size} rows: {log['warning']}")
    columns: Columns = plan.argmax(axis=1)
    return columns


def solve_with_lapx(cost: Cost) -> Columns:
    """The exact Jonker-Volgenant solver of lapx; releases the interpreter lock."""
    import lap

    columns: Columns
    _, columns = lap.lapjvs(cost, return_cost=False, prefer_float32=cost.dtype == np.float32)
    return columns


def certify(
    gain: Tensor,
    columns: Tensor,
    tolerance: float = 0.0,
    max_sweeps: int = 1000,
    start: Tensor | None = None,
) -> Certificate:
    """Bound how far an assignment can be from the optimum, by dual potentials that are feasible by construction.

    Potentials with ``u_i + v_j >= gain_ij``, tight on the matched pairs, exist exactly when the assignment is
    optimal; they are the longest paths of its exchange graph, found by Bellman-Ford sweeps over blocks of rows.
    The bound holds whatever the sweeps reached, so nothing is assumed of the solver.

    Args:
        gain: ``[I, I]``, to be maximised; the arithmetic here is float64.
        columns: ``[I]`` int64, row i is matched to ``columns[i]``.
        tolerance: stop sweeping once potentials grow by no more than this in sum. What is left may be more: the gap
            is then at most ``I * tolerance``, since one potential can raise all others by as much as itself.
        max_sweeps: most sweeps.
        start: column potentials ``[I]`` float64 to sweep from, such as those of a like problem; by default half the
            matched gains, which are feasible at once where the rows are noisy copies of each other.
    """
    size = len(gain)
    step = min(size, max(1, _BLOCK // size))
    blocks = [slice(first, first + step) for first in range(0, size, step)]
    matched = gain[torch.arange(size), columns].double()
    # Written for every block: fresh memory each time would be touched anew.
    block_sums, block_best = matched.new_empty(step, size), matched.new_empty(size)

    def raise_to(potential: Tensor, block: slice, offset: Tensor) -> None:
        """Set potential_j to max(potential_j, max over the rows i of the block of gain_ij + offset_i)."""
        sums = block_sums[: len(offset)]
        torch.add(gain[block], offset[:, None], out=sums)
        torch.amax(sums, 0, out=block_best)
        torch.maximum(potential, block_best, out=potential)

    potential = torch.empty_like(matched)  # v, by column
    potential[columns] = matched / 2
    if start is not None:
        potential.copy_(start)
    for _ in range(max_sweeps):
        before = potential.sum()
        for block in blocks:
            raise_to(potential, block, potential[columns[block]] - matched[block])
        if potential.sum() - before <= tolerance:
            break
    u = matched - potential[columns]
    v = torch.full_like(potential, -torch.inf)
    for block in blocks:
        raise_to(v, block, -u[block])
    return Certificate((u.sum() + v.sum() - matched.sum()).item(), v, u)
