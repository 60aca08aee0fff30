"""The least total error within a byte budget: frontiers of layers, added up one after the other.

Discrete rate-distortion. Adding frontiers of undominated choices is exact where nothing is thinned, unlike a walk
along convex hulls, which leaves bytes over and can't reach choices inside of a hull.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from compress_tools.planner.frontier import Frontier, Pick, combined


@dataclass(frozen=True)
class Allocation(Generic[Pick]):
    """A choice for each layer.

    Attributes:
        nbytes: of each layer.
        errors: of each layer.
        picks: the chosen pick of each layer.
    """

    nbytes: tuple[int, ...]
    errors: tuple[float, ...]
    picks: tuple[Pick, ...]

    @property
    def error(self) -> float:
        """Of all layers."""
        return sum(self.errors)


def smallest(layers: Sequence[Frontier[Pick]]) -> int:
    """Bytes of the smallest choices."""
    return sum(int(layer.nbytes[0]) for layer in layers)


def allocate(layers: Sequence[Frontier[Pick]], budget: float) -> Allocation[Pick]:
    """Pick one choice of each layer at the least total error within ``budget`` bytes.

    Args:
        layers: frontiers, none of them empty.
        budget: at least ``smallest(layers)``.
    """
    sums: Frontier[tuple[int, ...]] | None = None
    rest = smallest(layers)
    for layer in layers:
        # Each later layer takes its smallest choice at least.
        rest -= int(layer.nbytes[0])
        indexed = Frontier(layer.nbytes, layer.errors, list(range(len(layer.nbytes))))
        if sums is None:
            sums = indexed.within(0, budget - rest).map(lambda index: (index,))
        else:
            sums = combined(sums, indexed, lambda before, index: (*before, index), budget - rest)
    chosen = _filled(layers, list(sums.picks[-1]) if sums is not None else [], budget)
    pairs = list(zip(layers, chosen, strict=True))
    return Allocation(
        tuple(int(layer.nbytes[index]) for layer, index in pairs),
        tuple(float(layer.errors[index]) for layer, index in pairs),
        tuple(layer.picks[index] for layer, index in pairs),
    )


def _filled(layers: Sequence[Frontier[Pick]], chosen: list[int], budget: float) -> list[int]:
    """Spend what thinning left over, each time where it lowers the error most."""
    while True:
        slack = budget - sum(int(layer.nbytes[index]) for layer, index in zip(layers, chosen, strict=True))
        moves = []
        for number, (layer, index) in enumerate(zip(layers, chosen, strict=True)):
            better = layer.best_within(int(layer.nbytes[index]) + slack)
            if better is not None and better > index:
                moves.append((float(layer.errors[index] - layer.errors[better]), number, better))
        if not moves:
            return chosen
        _, number, better = max(moves)
        chosen[number] = better
