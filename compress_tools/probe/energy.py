"""How a matrix's energy is spread over its singular values and over its entries."""

from collections import defaultdict
from math import floor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Shares of singular values and of entries at which energy curves are taken.
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 1.0)

Curves = dict[str, list[float]]


def magnitude_curve(matrix: Tensor) -> list[float]:
    """Share of the energy in the largest ``SHARES`` of the entries."""
    return _curve(np.sort(matrix.abs().flatten().cpu().numpy()))


def spectrum_curve(matrix: Tensor) -> list[float]:
    """Share of the energy in the largest ``SHARES`` of the singular values, by the smaller Gram matrix in float64."""
    wide = matrix.double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    return _curve(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().cpu().numpy())


def _curve(ascending: NDArray[np.floating]) -> list[float]:
    """Of values sorted, smallest first; between counts linear; 1 throughout for zeros."""
    sums = np.concatenate([[0.0], np.cumsum(np.square(ascending, dtype=np.float64))])
    if not sums[-1]:
        return [1.0] * len(SHARES)
    curve = []
    for share in SHARES:
        place = len(ascending) * (1 - share)
        below = floor(place)
        above = min(below + 1, len(ascending))
        curve.append(1 - float((sums[below] + (place - below) * (sums[above] - sums[below])) / sums[-1]))
    return curve


class CurveMean:
    """Mean of curves by name."""

    def __init__(self) -> None:
        self._found: dict[str, list[list[float]]] = defaultdict(list)

    def add(self, name: str, curve: list[float]) -> None:
        """One more of these."""
        self._found[name].append(curve)

    def curves(self) -> Curves:
        """The means."""
        return {
            name: [sum(at) / len(curves) for at in zip(*curves, strict=True)] for name, curves in self._found.items()
        }
