"""Match each expert's rows to the center's at least squared distance. Sole caller of the assignment solvers."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress_tools.center.assignment import MAX_GAP, Certificate, certify, solve_assignment
from compress_tools.center.optimality_proofs import is_certainly_optimal, rows_too_close
from compress_tools.errors import NumericalError
from compress_tools.numerics.clock import StageClock
from compress_tools.numerics.parallel import in_parallel
from compress_tools.numerics.products import product, row_distances, squared_distance, squared_norm

# From this many rows on, the whole product costs more than the few passes that may prove a guess without it.
PROVE_FROM_ROWS = 4096

# An earlier permutation that is still optimal shows it within a few sweeps; beyond these, solving is cheaper.
_WARM_SWEEPS = 6


@dataclass(frozen=True)
class Alignment:
    """Every expert matched to the center.

    Attributes:
        perm: ``[E, I]`` int64 on the CPU, with ``aligned[e] = design[e][perm[e]]``.
        distance: ``[E]`` float64, ``||aligned[e] - center||_F^2``.
        gap: ``[E]`` float64, certified distance from the optimum, relative to ``distance``.
        proof: for each expert its dual potentials, or None where no solver ran; a warm start for the next center.
    """

    perm: Tensor
    distance: Tensor
    gap: Tensor
    proof: tuple[Certificate | None, ...]


@dataclass(frozen=True)
class _Match:
    perm: Tensor
    distance: float
    gap: float
    proof: Certificate | None = None


def align_experts(
    design: Tensor,
    center: Tensor,
    workers: int = 1,
    advance: Callable[[], None] = lambda: None,
    guess: Tensor | None = None,
    proof: tuple[Certificate | None, ...] | None = None,
    clock: StageClock | None = None,
) -> Alignment:
    """Match each expert's rows to the center's at least squared distance (arXiv:2503.06881, sec. 4.2).

    Only the inner products decide the assignment: squared norms add the same to every permutation. A guess that can
    be proved optimal is taken at a fraction of the cost (``optimality_proofs``); otherwise the whole product is made,
    the guess tested on it, and only then solved for. Every result is certified, whichever way it came.

    Args:
        design: design matrices ``[E, I, D]``, any float dtype; products in fp32.
        center: center rows ``[I, D]``, fp32, same device.
        workers: experts matched side by side.
        advance: called after each expert.
        guess: permutations ``[E, I]`` that may be right, such as the last iteration's.
        proof: ``Alignment.proof`` of an earlier center.
        clock: told of "cost matrix" and "assignment".
    Returns:
        permutations, squared distances, and certified gaps.
    Raises:
        NumericalError: a cost is not finite, or no solver comes within ``MAX_GAP``; names the expert.
    """
    center_energy = squared_norm(center)
    proving = guess is not None and len(center) >= PROVE_FROM_ROWS
    if proving:
        with (clock or StageClock()).stage("cost matrix"):
            close, distance = _first_proof(design, center, guess, workers)

    def match(expert: int) -> tuple[_Match, StageClock]:
        known = guess[expert] if guess is not None else None
        warm = proof[expert] if proof is not None else None
        own = StageClock()
        with own.stage("cost matrix"):
            proved = _proved(center, design[expert], known, close, distance[expert]) if proving else None
        found = proved or _match(expert, design[expert], center, center_energy, known, warm, own)
        advance()
        return found, own

    start = time.perf_counter()
    results = in_parallel(match, range(len(design)), workers)
    if clock is not None:
        clock.share_out(time.perf_counter() - start, [own for _, own in results])
    found = [match for match, _ in results]
    return Alignment(
        torch.stack([match.perm for match in found]),
        torch.tensor([match.distance for match in found], dtype=torch.float64),
        torch.tensor([match.gap for match in found], dtype=torch.float64),
        tuple(match.proof for match in found),
    )


def _match(
    expert: int,
    weights: Tensor,
    center: Tensor,
    center_energy: float,
    guess: Tensor | None,
    warm: Certificate | None,
    clock: StageClock,
) -> _Match:
    """One expert ``weights`` [I, D] against the center."""
    with clock.stage("cost matrix"):
        gain = product(center, weights.float().T).cpu()  # [I center, I expert], fp32
        if not torch.isfinite(torch.stack(gain.aminmax())).all():  # NaN where a gain is; isfinite(gain) takes 1.2 GB
            raise NumericalError(f"expert {expert}: the alignment cost overflows fp32")
    with clock.stage("assignment"):
        return _solve(expert, center, weights, gain, center_energy, guess, warm)


def _first_proof(design: Tensor, center: Tensor, guess: Tensor, workers: int) -> tuple[Tensor | None, list[float]]:
    """Rows that the center's own distances leave open, see ``rows_too_close``; each expert's squared distance."""

    def distances(expert: int) -> Tensor:
        return row_distances(center, design[expert][guess[expert].to(design.device)])

    found = in_parallel(distances, range(len(design)), workers)
    close = rows_too_close(center, torch.stack(found).amax(0).sqrt(), workers)
    return close, [rows.double().sum().item() for rows in found]


def _proved(center: Tensor, weights: Tensor, guess: Tensor, close: Tensor | None, distance: float) -> _Match | None:
    """The guess, if it can be proved optimal without the whole cost matrix; ``close``: rows left to prove, or all."""
    if distance == 0 or (close is not None and not len(close)):
        return _Match(guess, distance, 0.0)
    aligned = weights[guess.to(weights.device)].float()
    return _Match(guess, distance, 0.0) if is_certainly_optimal(center, aligned, close) else None


def _solve(
    expert: int,
    center: Tensor,
    weights: Tensor,
    gain: Tensor,
    center_energy: float,
    guess: Tensor | None,
    warm: Certificate | None,
) -> _Match:
    scale = center_energy + squared_norm(weights)

    def finish(columns: Tensor, sweeps: int) -> _Match:
        distance = squared_distance(center, weights[columns.to(weights.device)])
        # Rounding of fp32 products bounds what a distance can mean; equal rows have distance 0 and gap 0.
        meaning = max(distance, 1e-9 * scale)
        start = warm.column_potential if warm is not None else None
        proof = certify(gain, columns, 0.1 * MAX_GAP * meaning / 2, sweeps, start)
        gap = max(2 * proof.gap / meaning, 0.0) if meaning else 0.0
        return _Match(columns, distance, gap, proof)

    if guess is not None:
        match = finish(guess, _WARM_SWEEPS)
        if match.gap <= MAX_GAP:
            return match
    for dtype in (np.float32, np.float64):
        match = finish(torch.from_numpy(solve_assignment(_cost(gain, warm, dtype))).long(), 1000)
        if match.gap <= MAX_GAP:
            return match
    raise NumericalError(f"expert {expert}: assignment not certified optimal: relative duality gap {match.gap:.3g}")


def _cost(gain: Tensor, warm: Certificate | None, dtype: type[np.floating]) -> np.ndarray:
    """The negative gains, one matrix and no copy of it: at 14336 rows each takes 0.8 GB."""
    cost = np.negative(gain.numpy(), dtype=dtype)
    if warm is not None:
        # Costs reduced by the last iteration's duals have the same optimum, and nearly show it.
        cost += warm.row_potential.numpy().astype(dtype)[:, None]
        cost += warm.column_potential.numpy().astype(dtype)
    return cost
