"""Match each expert's rows to the center's at least squared distance. Sole caller of the assignment solvers."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from compress_tools.errors import NumericalError

# POT's network simplex is the reference and quick enough below this many rows; lapx's Jonker-Volgenant above.
POT_MAX_ROWS = 256


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


def align_experts(
    design: Tensor,
    center: Tensor,
    workers: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Match each expert's rows to the center's at least squared distance (arXiv:2503.06881, sec. 4.2).

    Only the inner products decide the assignment: squared norms add the same to every permutation.

    Args:
        design: design matrices ``[E, I, D]``, fp32.
        center: center rows ``[I, D]``, fp32, same device.
        workers: assignments solved in parallel (threads; the solver releases the lock).
        advance: called after each expert.
    Returns:
        perm ``[E, I]`` int64 on the CPU, with ``aligned[e] = design[e][perm[e]]``, and the squared distances
        ``[E]`` float64 after alignment.
    Raises:
        NumericalError: a cost is not finite; names the expert.
    """
    center_energy = center.double().square().sum().item()

    def products(expert: int) -> np.ndarray:
        gain = center @ design[expert].T  # [I center, I expert], fp32
        if not torch.isfinite(gain).all():
            raise NumericalError(f"expert {expert}: the alignment cost overflows fp32")
        return gain.cpu().numpy()

    def finish(expert: int, gain: np.ndarray) -> tuple[np.ndarray, float]:
        columns = solve_assignment(-gain)
        matched = np.take_along_axis(gain, columns[:, None], axis=1).sum(dtype=np.float64)
        advance()
        return columns, float(matched)

    perms: list[np.ndarray] = []
    distances: list[float] = []
    # Products run one after another so that their bytes don't depend on the number of workers.
    with ThreadPoolExecutor(workers) as pool:
        pending = []
        for expert in range(len(design)):
            pending.append(pool.submit(finish, expert, products(expert)))
            if len(pending) > workers:
                pending[expert - workers].result()
        for expert, future in enumerate(pending):
            columns, matched = future.result()
            perms.append(columns)
            energy = design[expert].double().square().sum().item()
            distances.append(energy + center_energy - 2 * matched)
    return torch.from_numpy(np.stack(perms).astype(np.int64)), torch.tensor(distances, dtype=torch.float64)
