"""The least total error within a byte budget: frontiers of layers, added up one after the other.

Discrete rate-distortion. Adding frontiers of undominated choices is exact where nothing is thinned, unlike a walk
along convex hulls, which leaves bytes over and can't reach choices inside of a hull.
"""

from dataclasses import dataclass
from typing import Any

from compress_tools.planner.frontier import Frontier, combined


@dataclass(frozen=True)
class Allocation:
    """A choice for each layer.

    Attributes:
        nbytes: of each layer.
        errors: of each layer.
        picks: the chosen pick of each layer.
    """

    nbytes: tuple[int, ...]
    errors: tuple[float, ...]
    picks: tuple[Any, ...]

    @property
    def error(self) -> float:
        """Of all layers."""
        return sum(self.errors)


def smallest(layers: list[Frontier]) -> int:
    """Bytes of the smallest choices."""
    return sum(int(layer.nbytes[0]) for layer in layers)


def allocate(layers: list[Frontier], budget: float) -> Allocation:
    """Pick one choice of each layer at the least total error within ``budget`` bytes.

    Args:
        layers: frontiers, none of them empty.
        budget: at least ``smallest(layers)``.
    """
    sums = Frontier(layers[0].nbytes[:0], layers[0].errors[:0], [])
    rest = smallest(layers)
    for number, layer in enumerate(layers):
        # Each later layer takes its smallest choice at least.
        rest -= int(layer.nbytes[0])
        indexed = Frontier(layer.nbytes, layer.errors, [(index,) for index in range(len(layer.nbytes))])
        sums = indexed.within(0, budget - rest) if number == 0 else combined(sums, indexed, budget - rest)
    chosen = _filled(layers, list(sums.picks[-1]), budget)
    pairs = list(zip(layers, chosen, strict=True))
    return Allocation(
        tuple(int(layer.nbytes[index]) for layer, index in pairs),
        tuple(float(layer.errors[index]) for layer, index in pairs),
        tuple(layer.picks[index][0] for layer, index in pairs),
    )


def _filled(layers: list[Frontier], chosen: list[int], budget: float) -> list[int]:
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
