"""Match each expert's rows to the center's at least squared distance. Sole caller of the assignment solvers."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress_tools.errors import NumericalError

# POT's network simplex is the reference and quick enough below this many rows; lapx's Jonker-Volgenant above.
POT_MAX_ROWS = 256

# A relative duality gap above this is a solver's failure: the assignment is solved again in float64, then refused.
MAX_GAP = 1e-6

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Alignment:
    """Every expert matched to the center.

    Attributes:
        perm: ``[E, I]`` int64 on the CPU, with ``aligned[e] = design[e][perm[e]]``.
        distance: ``[E]`` float64, ``||aligned[e] - center||_F^2``.
        gap: ``[E]`` float64, certified distance from the optimum, relative to ``distance``.
    """

    perm: Tensor
    distance: Tensor
    gap: Tensor


def solve_assignment(cost: np.ndarray) -> np.ndarray:
    """Optimal assignment of a square cost matrix.

    Args:
        cost: ``[I, I]`` float32 or float64, finite.
    Returns:
        columns ``[I]`` int64: row i is matched to ``columns[i]``.
    """
    if len(cost) <= POT_MAX_ROWS:
        return solve_with_pot(cost)
    return solve_with_lapx(cost)


def solve_with_pot(cost: np.ndarray) -> np.ndarray:
    """POT's exact ``emd`` with uniform masses and no pivot cap; the plan is a permutation."""
    import ot

    size = len(cost)
    mass = np.ones(size)
    distance = cost.astype(np.float64)
    distance -= distance.min()  # emd takes distances: some negative costs are called infeasible
    plan, log = ot.emd(mass, mass, distance, numItermax=2**62, log=True)
    if log["warning"] is not None:
        raise NumericalError(f"POT emd did not reach the optimum on {size} rows: {log['warning']}")
    return plan.argmax(axis=1)


def solve_with_lapx(cost: np.ndarray) -> np.ndarray:
    """lapx's exact Jonker-Volgenant solver; releases the interpreter lock."""
    import lap

    _, columns = lap.lapjvs(cost, return_cost=False, prefer_float32=False)
    return columns


def duality_gap(gain: Tensor, columns: Tensor, tolerance: float = 0.0, max_sweeps: int = 1000) -> float:
    """How far an assignment can be from the optimum, from dual potentials that are feasible by construction.

    Potentials with ``u_i + v_j >= gain_ij``, tight on the matched pairs, exist exactly when the assignment is
    optimal; they are the longest paths of its exchange graph, found by Bellman-Ford sweeps over blocks of rows.
    The bound holds whatever the sweeps reached, so nothing is assumed of the solver.

    Args:
        gain: ``[I, I]``, to be maximised; the arithmetic here is float64.
        columns: ``[I]`` int64, row i is matched to ``columns[i]``.
        tolerance: stop sweeping once potentials grow by no more than this in sum.
        max_sweeps: most sweeps.
    Returns:
        upper bound minus the assignment's value, in the unit of ``gain``; at least 0 up to rounding.
    """
    rows = torch.arange(len(gain))
    matched = gain[rows, columns].double()
    potential = torch.zeros(len(gain), dtype=torch.float64)  # v, by column
    for _ in range(max_sweeps):
        before = potential.sum()
        for block in rows.split(_ROWS_AT_ONCE):
            offset = potential[columns[block]] - matched[block]
            potential = torch.maximum(potential, (gain[block].double() + offset[:, None]).amax(0))
        if potential.sum() - before <= tolerance:
            break
    u = matched - potential[columns]
    v = torch.full_like(potential, -torch.inf)
    for block in rows.split(_ROWS_AT_ONCE):
        v = torch.maximum(v, (gain[block].double() - u[block, None]).amax(0))
    return (u.sum() + v.sum() - matched.sum()).item()


def align_experts(
    design: Tensor,
    center: Tensor,
    workers: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> Alignment:
    """Match each expert's rows to the center's at least squared distance (arXiv:2503.06881, sec. 4.2).

    Only the inner products decide the assignment: squared norms add the same to every permutation.

    Args:
        design: design matrices ``[E, I, D]``, fp32.
        center: center rows ``[I, D]``, fp32, same device.
        workers: assignments solved in parallel (threads; the solver releases the lock).
        advance: called after each expert.
    Returns:
        permutations, squared distances, and certified gaps.
    Raises:
        NumericalError: a cost is not finite, or no solver comes within ``MAX_GAP``; names the expert.
    """
    center_energy = _energy(center)

    def products(expert: int) -> Tensor:
        gain = center @ design[expert].T  # [I center, I expert], fp32
        if not torch.isfinite(gain).all():
            raise NumericalError(f"expert {expert}: the alignment cost overflows fp32")
        return gain.cpu()

    def finish(expert: int, gain: Tensor, energy: float) -> tuple[Tensor, float, float]:
        for dtype in (np.float32, np.float64):
            columns = torch.from_numpy(solve_assignment(-gain.numpy().astype(dtype))).long()
            matched = gain[torch.arange(len(gain)), columns].sum(dtype=torch.float64).item()
            # Rounding of fp32 products bounds what a distance can mean; equal rows have distance 0 and gap 0.
            distance = max(energy + center_energy - 2 * matched, 1e-9 * (energy + center_energy))
            gap = 2 * duality_gap(gain, columns, tolerance=0.1 * MAX_GAP * distance / 2) / distance if distance else 0.0
            if gap <= MAX_GAP:
                advance()
                return columns, energy + center_energy - 2 * matched, max(gap, 0.0)
        raise NumericalError(f"expert {expert}: assignment not certified optimal: relative duality gap {gap:.3g}")

    results: list[tuple[Tensor, float, float]] = []
    # Products run one after another so that their bytes don't depend on the number of workers.
    with ThreadPoolExecutor(workers) as pool:
        pending = []
        for expert in range(len(design)):
            pending.append(pool.submit(finish, expert, products(expert), _energy(design[expert])))
            if len(pending) > workers:
                pending[expert - workers].result()
        results = [future.result() for future in pending]
    perms, distances, gaps = zip(*results, strict=True)
    return Alignment(
        torch.stack(perms), torch.tensor(distances, dtype=torch.float64), torch.tensor(gaps, dtype=torch.float64)
    )


def _energy(matrix: Tensor) -> float:
    """Sum of squares in float64, without a float64 copy of the whole."""
    return sum(block.double().square().sum().item() for block in matrix.split(_ROWS_AT_ONCE))
