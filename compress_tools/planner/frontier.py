"""Sets of choices that are worth their bytes: each has less error than every choice of fewer bytes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

# Sums of choices beyond this many are thinned evenly in bytes: with n sums the loss is below n / MAX_POINTS of the
# budget, and in practice far below (test_planner compares with brute force).
MAX_POINTS = 4096

Pick = TypeVar("Pick", covariant=True)
Other = TypeVar("Other")
Joined = TypeVar("Joined")


@dataclass(frozen=True)
class Point(Generic[Pick]):
    """One choice: what it takes, what it loses, and what it is."""

    nbytes: int
    error: float
    pick: Pick


@dataclass(frozen=True)
class Frontier(Generic[Pick]):
    """Choices by ascending bytes and falling error.

    Attributes:
        nbytes: int64 ``[N]``.
        errors: float64 ``[N]``.
        picks: what each choice is.
    """

    nbytes: NDArray[np.int64]
    errors: NDArray[np.float64]
    picks: Sequence[Pick]

    def within(self, least: float, most: float) -> "Frontier[Pick]":
        """The choices of at least ``least`` and at most ``most`` bytes."""
        inside = np.flatnonzero((self.nbytes >= least) & (self.nbytes <= most))
        return Frontier(self.nbytes[inside], self.errors[inside], [self.picks[index] for index in inside])

    def shifted(self, nbytes: int) -> "Frontier[Pick]":
        """Every choice with ``nbytes`` more."""
        return Frontier(self.nbytes + nbytes, self.errors, self.picks)

    def map(self, function: Callable[[Pick], Other]) -> "Frontier[Other]":
        """The same choices, each pick replaced by ``function(pick)``."""
        return Frontier(self.nbytes, self.errors, [function(pick) for pick in self.picks])

    def best_within(self, nbytes: float) -> int | None:
        """Index of the choice of least error within ``nbytes`` bytes."""
        count = int(np.searchsorted(self.nbytes, nbytes, side="right"))
        return count - 1 if count else None

    def points(self) -> list[Point[Pick]]:
        """Its choices."""
        columns = zip(self.nbytes.tolist(), self.errors.tolist(), self.picks, strict=True)
        return [Point(nbytes, error, pick) for nbytes, error, pick in columns]


def frontier(points: Iterable[Point[Pick]]) -> Frontier[Pick]:
    """The frontier of some choices."""
    listed = list(points)
    nbytes = np.array([point.nbytes for point in listed], dtype=np.int64)
    errors = np.array([point.error for point in listed], dtype=np.float64)
    kept = _undominated(nbytes, errors)
    return Frontier(nbytes[kept], errors[kept], [listed[index].pick for index in kept])


def union(parts: Iterable[Frontier[Pick]]) -> Frontier[Pick]:
    """The frontier of all choices of several."""
    return frontier(point for part in parts for point in part.points())


def combined(
    left: Frontier[Pick],
    right: Frontier[Other],
    join: Callable[[Pick, Other], Joined],
    most: float = float("inf"),
) -> Frontier[Joined]:
    """The frontier of every choice of ``left`` with every one of ``right``, thinned to ``MAX_POINTS``.

    Args:
        left: choices.
        right: choices.
        join: one pick of two; bytes and errors add up.
        most: bytes that a sum may take.
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
    picks = [join(left.picks[index // width], right.picks[index % width]) for index in kept.tolist()]
    return Frontier(nbytes[kept], errors[kept], picks)


def _undominated(nbytes: NDArray[np.int64], errors: NDArray[np.float64]) -> NDArray[np.intp]:
    """Indices of the frontier, by ascending bytes; of equal choices the first."""
    order: NDArray[np.intp] = np.lexsort((errors, nbytes))
    best = np.minimum.accumulate(errors[order])
    better = np.ones(len(order), dtype=bool)
    better[1:] = errors[order][1:] < best[:-1]
    kept: NDArray[np.intp] = order[better]
    return kept
