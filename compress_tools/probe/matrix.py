"""A matrix as its coders see it: energy by entry and by singular value, and what rounding to few bits loses."""

from functools import cached_property
from math import ceil, floor

import numpy as np
import torch
from torch import Tensor

GROUP = 128  # weights that share one fp16 scale
SCALE_BITS = 16

_SAMPLED_VALUES = 2**17
_ROWS_AT_ONCE = 32
# Largest level over largest magnitude; the best of them is taken group by group.
_SCALE_FACTORS = np.linspace(0.4, 1.0, 11).tolist()


def quantise(matrix: Tensor, bits: int) -> Tensor:
    """Round to the nearest of ``2**bits`` symmetric levels (odd multiples of half a step).

    Each group of 128 columns has a scale of its own in fp16, the one of 11 that loses least.

    Args:
        matrix: ``[rows, columns]`` fp32; a last group may be shorter.
        bits: per value, at least 1.
    Returns:
        the values that such a code stands for, fp32, matrix's shape.
    """
    whole = matrix.shape[1] // GROUP * GROUP
    done = torch.empty_like(matrix)
    # Blocks that stay in the cache.
    for block, rows in zip(done.split(_ROWS_AT_ONCE), matrix.split(_ROWS_AT_ONCE), strict=True):
        if whole:
            groups = rows[:, :whole].reshape(-1, GROUP)
            block[:, :whole] = _quantise_groups(groups, bits).reshape(len(rows), whole)
        if whole < matrix.shape[1]:
            block[:, whole:] = _quantise_groups(rows[:, whole:], bits)
    return done


def _quantise_groups(groups: Tensor, bits: int) -> Tensor:
    top_level = 2 ** (bits - 1) - 0.5
    largest = groups.abs().amax(1, keepdim=True)
    best = torch.zeros_like(groups)
    best_error = groups.square().sum(1, keepdim=True)  # all zero: what a scale that rounds to 0 gives
    for factor in _SCALE_FACTORS:
        scale = (factor * largest / top_level).half().float()
        safe = torch.where(scale > 0, scale, 1)
        levels = ((groups / safe).floor() + 0.5).clamp(-top_level, top_level) * scale
        error = (groups - levels).square().sum(1, keepdim=True)
        best = torch.where(error < best_error, levels, best)
        best_error = torch.minimum(error, best_error)
    return best


def quantised_bits(bits: int, hidden_size: int) -> float:
    """Bits per weight of a quantised matrix with rows of H: values and scales."""
    return bits + SCALE_BITS * ceil(hidden_size / GROUP) / hidden_size


class SortedEnergy:
    """Running sums of squares in float64 of magnitudes, given smallest first."""

    def __init__(self, magnitudes: np.ndarray) -> None:
        self._sums = np.zeros(len(magnitudes) + 1)
        sums = self._sums[1:]
        np.square(magnitudes, dtype=np.float64, out=sums)
        np.cumsum(sums, out=sums)

    def dropped(self, kept: int) -> float:
        """Share of the energy lost when only the ``kept`` largest stay; 0 for a zero matrix."""
        return float(self._sums[-1 - kept] / self._sums[-1]) if self._sums[-1] else 0.0

    def share(self, largest: float) -> float:
        """Share of the energy in the largest ``largest`` share of values, between counts linear; 1 for zeros."""
        if not self._sums[-1]:
            return 1.0
        place = (len(self._sums) - 1) * (1 - largest)
        below = floor(place)
        above = min(below + 1, len(self._sums) - 1)
        rest = self._sums[below] + (place - below) * (self._sums[above] - self._sums[below])
        return 1 - float(rest / self._sums[-1])


class MeasuredMatrix:
    """A matrix and what the coders must know of it, each measured once, on demand.

    Args:
        matrix: ``[rows, P*H]`` fp32.
        hidden_size: H.
        spectrum_columns: columns that the singular values are taken of; None for all.
    """

    def __init__(self, matrix: Tensor, hidden_size: int, spectrum_columns: Tensor | None = None) -> None:
        self.matrix = matrix
        self.hidden_size = hidden_size
        self._spectrum_columns = spectrum_columns
        self._quantisation: dict[int, float] = {}
        self._step = ceil(matrix.numel() / _SAMPLED_VALUES)

    @property
    def spectrum_shape(self) -> tuple[int, int]:
        """Shape of what the singular values are taken of."""
        rows, columns = self.matrix.shape
        return rows, columns if self._spectrum_columns is None else len(self._spectrum_columns)

    @cached_property
    def energy(self) -> float:
        """Sum of squares, float64."""
        return sum(row_block.double().square().sum().item() for row_block in self.matrix.split(256))

    @cached_property
    def _magnitudes(self) -> np.ndarray:
        return np.sort(self.matrix.abs().flatten().cpu().numpy())

    @cached_property
    def magnitudes(self) -> SortedEnergy:
        """Energy by entry."""
        return SortedEnergy(self._magnitudes)

    @cached_property
    def spectrum(self) -> SortedEnergy:
        """Energy by singular value, from the smaller Gram matrix in float64."""
        wide = (self.matrix if self._spectrum_columns is None else self.matrix[:, self._spectrum_columns]).double()
        gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
        return SortedEnergy(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().cpu().numpy())

    def quantisation_error(self, bits: int) -> float:
        """Share of the energy that ``quantise`` loses, on evenly spaced rows."""
        if bits not in self._quantisation:
            sample = self.matrix[:: self._step].reshape(-1, self.hidden_size)
            self._quantisation[bits] = _relative_error(sample, bits)
        return self._quantisation[bits]

    def kept_quantisation_error(self, kept: int, bits: int) -> float:
        """Share of the kept entries' energy that ``quantise`` loses on their stream, on evenly spaced rows."""
        sample = self.matrix[:: self._step]
        stream = sample[sample.abs() >= float(self._magnitudes[-kept])]
        stream = stream[: len(stream) // GROUP * GROUP].view(-1, GROUP) if len(stream) >= GROUP else stream[None]
        return _relative_error(stream, bits) if stream.numel() else 0.0


def _relative_error(sample: Tensor, bits: int) -> float:
    energy = sample.double().square().sum().item()
    return (quantise(sample, bits) - sample).double().square().sum().item() / energy if energy else 0.0
