"""Sets of choices that are worth their bytes: each has less error than every choice of fewer bytes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

# Sums of choices beyond this many are thinned evenly in bytes: with n sums the loss is below n / MAX_POINTS of the
# budget, and in practice far below (test_planner compares with brute force).
MAX_POINTS = 4096


@dataclass(frozen=True)
class Frontier:
    """Choices by ascending bytes and falling error.

    Attributes:
        nbytes: int64 ``[N]``.
        errors: float64 ``[N]``.
        picks: for each choice what was picked, one item for each frontier that was combined.
    """

    nbytes: np.ndarray
    errors: np.ndarray
    picks: list[tuple[Any, ...]]

    def within(self, least: float, most: float) -> "Frontier":
        """The choices of at least ``least`` and at most ``most`` bytes."""
        inside = np.flatnonzero((self.nbytes >= least) & (self.nbytes <= most))
        return self._at(inside)

    def shifted(self, nbytes: int) -> "Frontier":
        """Every choice with ``nbytes`` more."""
        return Frontier(self.nbytes + nbytes, self.errors, self.picks)

    def as_one(self) -> "Frontier":
        """Each choice's picks as one item."""
        return Frontier(self.nbytes, self.errors, [(pick,) for pick in self.picks])

    def best_within(self, nbytes: float) -> int | None:
        """Index of the choice of least error within ``nbytes`` bytes."""
        count = int(np.searchsorted(self.nbytes, nbytes, side="right"))
        return count - 1 if count else None

    def _at(self, indices: np.ndarray) -> "Frontier":
        return Frontier(self.nbytes[indices], self.errors[indices], [self.picks[index] for index in indices])


def frontier(choices: Iterable[tuple[int, float, tuple[Any, ...]]]) -> Frontier:
    """The frontier of (bytes, error, picks)."""
    listed = list(choices)
    nbytes = np.array([choice[0] for choice in listed], dtype=np.int64)
    errors = np.array([choice[1] for choice in listed], dtype=np.float64)
    kept = _undominated(nbytes, errors)
    return Frontier(nbytes[kept], errors[kept], [listed[index][2] for index in kept])


def union(parts: list[Frontier]) -> Frontier:
    """The frontier of all choices of several."""
    return frontier(
        choice for part in parts for choice in zip(part.nbytes.tolist(), part.errors.tolist(), part.picks, strict=True)
    )


def combined(left: Frontier, right: Frontier, most: float = float("inf")) -> Frontier:
    """The frontier of every choice of ``left`` with every one of ``right``, within ``most`` bytes.

    Bytes and errors add up; picks are joined. Thinned to ``MAX_POINTS``.
    """
    nbytes = np.add.outer(left.nbytes, right.nbytes).ravel()
    errors = np.add.outer(left.errors, right.errors).ravel()
    inside = np.flatnonzero(nbytes <= most)
    kept = inside[_undominated(nbytes[inside], errors[inside])]
    if len(kept) > MAX_POINTS:
        low, high = nbytes[kept[0]], nbytes[kept[-1]]
        place = (nbytes[kept] - low) * (MAX_POINTS - 1) // (high - low)
        # of each interval of bytes the choice of least error; the smallest choice of all stays
        last = np.flatnonzero(np.append(place[1:] != place[:-1], True))
        kept = kept[np.union1d([0], last)]
    width = len(right.nbytes)
    picks = [left.picks[index // width] + right.picks[index % width] for index in kept.tolist()]
    return Frontier(nbytes[kept], errors[kept], picks)


def _undominated(nbytes: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Indices of the frontier, by ascending bytes; of equal choices the first."""
    order = np.lexsort((errors, nbytes))
    best = np.minimum.accumulate(errors[order])
    better = np.ones(len(order), dtype=bool)
    better[1:] = errors[order][1:] < best[:-1]
    return order[better]
