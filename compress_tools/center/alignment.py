"""Match each expert's rows to the center's at least squared distance. Sole caller of the assignment solvers."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress_tools.center.assignment import (
    MAX_GAP,
    Certificate,
    Cost,
    certify,
    solve_assignment,
    solve_with_lapx,
)
from compress_tools.center.optimality_proofs import is_certainly_optimal, rows_too_close
from compress_tools.errors import NumericalError
from compress_tools.numerics.clock import StageClock
from compress_tools.numerics.parallel import in_parallel
from compress_tools.numerics.products import product, row_distances, squared_distance, squared_norm
from compress_tools.numerics.work import Work

# From this many rows on, the whole product costs more than the few passes that may prove a guess without it.
PROVE_FROM_ROWS = 4096

# An earlier permutation that is still optimal shows it within a few sweeps; beyond these, solving is cheaper.
_WARM_SWEEPS = 6
_SWEEPS = 1000


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
class Start:
    """What is known before experts are aligned; it changes the time, not the result.

    Attributes:
        perm: permutations ``[E, I]`` that may be right, such as the last iteration's.
        proof: ``Alignment.proof`` of an earlier center.
    """

    perm: Tensor
    proof: tuple[Certificate | None, ...] | None = None

    def of(self, expert: int) -> tuple[Tensor, Certificate | None]:
        """One expert's permutation and duals."""
        return self.perm[expert], self.proof[expert] if self.proof is not None else None


@dataclass(frozen=True)
class _Match:
    perm: Tensor
    distance: float
    gap: float
    proof: Certificate | None = None


def align_experts(design: Tensor, center: Tensor, start: Start | None = None, work: Work | None = None) -> Alignment:
    """Match each expert's rows to the center's at least squared distance (arXiv:2503.06881, sec. 4.2).

    Only the inner products decide the assignment: squared norms add the same to every permutation. A guess that can
    be proved optimal is taken at a fraction of the cost (``optimality_proofs``); otherwise the whole product is made,
    the guess tested on it, and only then solved for. Every result is certified, whichever way it came.

    Args:
        design: design matrices ``[E, I, D]``, any float dtype; products in fp32.
        center: center rows ``[I, D]``, fp32, same device.
        start: a guess, and duals to start from.
        work: a step for each expert; seconds of "cost matrix" and "assignment".
    Returns:
        permutations, squared distances, and certified gaps.
    Raises:
        NumericalError: a cost is not finite, or no solver comes within ``MAX_GAP``; names the expert.
    """
    work = work or Work()
    center_energy = squared_norm(center)
    first: _FirstProof | None = None
    if start is not None and len(center) >= PROVE_FROM_ROWS:
        with work.clock.stage("cost matrix"):
            first = _first_proof(design, center, start.perm, work.workers)

    def match(expert: int) -> tuple[_Match, StageClock]:
        guess, warm = start.of(expert) if start is not None else (None, None)
        problem = _Problem(expert, design[expert], center, center_energy, guess, warm)
        own = StageClock()
        with own.stage("cost matrix"):
            found = first.match(problem) if first is not None else None
        found = found or problem.solved(own)
        work.progress.step()
        return found, own

    begun = time.perf_counter()
    results = in_parallel(match, range(len(design)), work.workers)
    work.clock.share_out(time.perf_counter() - begun, [own for _, own in results])
    found = [match for match, _ in results]
    return Alignment(
        torch.stack([match.perm for match in found]),
        torch.tensor([match.distance for match in found], dtype=torch.float64),
        torch.tensor([match.gap for match in found], dtype=torch.float64),
        tuple(match.proof for match in found),
    )


@dataclass(frozen=True)
class _Problem:
    """One expert to be matched to the center.

    Attributes:
        expert: its number, for errors.
        weights: ``[I, D]``.
        center: ``[I, D]`` fp32.
        center_energy: squared norm of the center.
        guess: a permutation that may be right.
        warm: duals of an earlier center.
    """

    expert: int
    weights: Tensor
    center: Tensor
    center_energy: float
    guess: Tensor | None
    warm: Certificate | None

    def solved(self, clock: StageClock) -> _Match:
        """By the whole product: the guess, if it proves optimal, or what a solver finds."""
        with clock.stage("cost matrix"):
            gain = product(self.center, self.weights.float().T).cpu()  # [I center, I expert], fp32
            # NaN where a gain is; isfinite(gain) takes 1.2 GB
            if not torch.isfinite(torch.stack(gain.aminmax())).all():
                raise NumericalError(f"expert {self.expert}: the alignment cost overflows fp32")
        with clock.stage("assignment"):
            return self._assigned(gain)

    def _assigned(self, gain: Tensor) -> _Match:
        for match in self._attempts(gain):
            if match.gap <= MAX_GAP:
                return match
        raise NumericalError(
            f"expert {self.expert}: assignment not certified optimal: relative duality gap {match.gap:.3g}"
        )

    def _attempts(self, gain: Tensor) -> Iterator[_Match]:
        """Matches from the cheapest to the surest; only the first that is certified is ever asked for."""
        if self.guess is not None:
            yield self._certified(gain, self.guess, _WARM_SWEEPS)
        for dtype in (np.float32, np.float64):
            columns = torch.from_numpy(solve_assignment(_cost(gain, self.warm, dtype))).long()
            yield self._certified(gain, columns, _SWEEPS)
        # Perhaps the match is right and its proof unfinished: sweeps stop when the potentials hardly rise, yet a
        # small rise of one can then raise many others. If a whole sweep raises them by t in sum, the next raises
        # each by at most t, which bounds the gap by I * t.
        thorough = replace(self, warm=None)
        yield thorough._certified(gain, columns, _SWEEPS, 1 / len(gain))
        # Or not quite right: POT takes reduced costs down to -2e-15 of the largest potential for 0, which near
        # copies of rows of very different size can tell from the optimum. Jonker-Volgenant compares exactly.
        columns = torch.from_numpy(solve_with_lapx(_cost(gain, None, np.float64))).long()
        yield thorough._certified(gain, columns, _SWEEPS, 1 / len(gain))

    def _certified(self, gain: Tensor, columns: Tensor, sweeps: int, share: float = 1.0) -> _Match:
        """A match and its gap; sweeps stop at a rise of ``share`` of a tenth of the largest gap that is let pass."""
        scale = self.center_energy + squared_norm(self.weights)
        distance = squared_distance(self.center, self.weights[columns.to(self.weights.device)])
        # Rounding of fp32 products bounds what a distance can mean; equal rows have distance 0 and gap 0.
        meaning = max(distance, 1e-9 * scale)
        start = self.warm.column_potential if self.warm is not None else None
        proof = certify(gain, columns, share * (0.1 * MAX_GAP * meaning / 2), sweeps, start)
        gap = max(2 * proof.gap / meaning, 0.0) if meaning else 0.0
        return _Match(columns, distance, gap, proof)


@dataclass(frozen=True)
class _FirstProof:
    """What the center's own distances prove of all experts at once.

    Attributes:
        close: rows that are left to prove; None for all, see ``rows_too_close``.
        distance: each expert's squared distance from the center, as guessed.
    """

    close: Tensor | None
    distance: list[float]

    def match(self, problem: _Problem) -> _Match | None:
        """The guess, if it can be proved optimal without the whole cost matrix."""
        distance, guess, weights = self.distance[problem.expert], problem.guess, problem.weights
        if guess is None:
            return None
        if distance == 0 or (self.close is not None and not len(self.close)):
            return _Match(guess, distance, 0.0)
        aligned = weights[guess.to(weights.device)].float()
        return _Match(guess, distance, 0.0) if is_certainly_optimal(problem.center, aligned, self.close) else None


def _first_proof(design: Tensor, center: Tensor, guess: Tensor, workers: int) -> _FirstProof:
    def distances(expert: int) -> Tensor:
        return row_distances(center, design[expert][guess[expert].to(design.device)])

    found = in_parallel(distances, range(len(design)), workers)
    close = rows_too_close(center, torch.stack(found).amax(0).sqrt(), workers)
    return _FirstProof(close, [rows.double().sum().item() for rows in found])


def _cost(gain: Tensor, warm: Certificate | None, dtype: type[np.floating[Any]]) -> Cost:
    """The negative gains, one matrix and no copy of it: at 14336 rows each takes 0.8 GB."""
    cost: Cost = np.negative(gain.numpy(), dtype=dtype)
    if warm is not None:
        # Costs reduced by the last iteration's duals have the same optimum, and nearly show it.
        cost += warm.row_potential.numpy().astype(dtype)[:, None]
        cost += warm.column_potential.numpy().astype(dtype)
    return cost
