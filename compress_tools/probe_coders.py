"""What a coder would lose on a matrix at a given number of bits per weight, read off measured energy curves.

Nothing is encoded here. Pruning and low rank follow from sorted energies, so that one sort and one factorisation
answer for every size (rounding of stored values to bf16, a few 1e-6, is left out). Quantisation is carried out, on
a sample of rows.
"""

from dataclasses import dataclass
from functools import cached_property
from math import ceil, floor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from compress_tools.errors import ConfigError
from compress_tools.format.tensors import mask_row_bytes
from compress_tools.residuals.budget import affordable_rank, kept_values

GROUP = 128  # weights that share one fp16 scale
SCALE_BITS = 16
DENSE_BITS = 16  # bf16, the unit of every byte ratio here
QUANTISED_BITS = (8, 4, 3, 2)

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


@dataclass(frozen=True)
class Outcome:
    """A coder at a size.

    Attributes:
        bits: bits per weight that it takes, at most what was offered.
        error: squared error over the matrix's energy.
        setting: what the bits bought, for people.
    """

    bits: float
    error: float
    setting: str


class Coder(Protocol):
    """A way to store a matrix.

    Attributes:
        name: for tables and JSON.
        center_bits: per weight, of the centers that may go with it: 16 is bf16, fewer are quantised.
    """

    name: str
    center_bits: tuple[int, ...]

    def predict(self, measured: MeasuredMatrix, bits: float) -> Outcome | None:
        """The outcome at no more than ``bits`` bits per weight; None where they buy nothing."""
        ...


@dataclass(frozen=True)
class PruneCoder:
    """Bitmap and kept values: bf16, or of ``value_bits`` bits with a scale for every 128 of them."""

    name: str
    value_bits: int
    center_bits: tuple[int, ...]

    def predict(self, measured: MeasuredMatrix, bits: float) -> Outcome | None:
        """See ``Coder.predict``."""
        rows, columns = measured.matrix.shape
        mask_bits = 8 * mask_row_bytes(measured.hidden_size) / measured.hidden_size
        coarse = self.value_bits < DENSE_BITS
        per_value = self.value_bits + (SCALE_BITS / GROUP if coarse else 0)
        density = min((bits - mask_bits) / per_value, 1.0)
        try:
            kept = kept_values(rows, columns, density)
        except ConfigError:
            return None
        error = measured.magnitudes.dropped(kept)
        if coarse:
            error += (1 - error) * measured.kept_quantisation_error(kept, self.value_bits)
        return Outcome(mask_bits + per_value * kept / measured.matrix.numel(), error, f"keeps {density:.1%}")


@dataclass(frozen=True)
class LowRankCoder:
    """Joint low rank, factors in bf16."""

    name: str = "low rank"
    center_bits: tuple[int, ...] = (DENSE_BITS,)

    def predict(self, measured: MeasuredMatrix, bits: float) -> Outcome | None:
        """See ``Coder.predict``."""
        rows, columns = measured.spectrum_shape
        try:
            rank = min(affordable_rank(rows, columns, bits / DENSE_BITS), rows, columns)
        except ConfigError:
            return None
        used = DENSE_BITS * rank * (rows + columns) / (rows * columns)
        return Outcome(used, measured.spectrum.dropped(rank), f"rank {rank / min(rows, columns):.1%}")


@dataclass(frozen=True)
class QuantiseCoder:
    """Round to nearest in groups of 128: the most bits of 8, 4, 3, 2 that fit."""

    name: str = "quantised"
    center_bits: tuple[int, ...] = (8, 4)

    def predict(self, measured: MeasuredMatrix, bits: float) -> Outcome | None:
        """See ``Coder.predict``."""
        for width in QUANTISED_BITS:
            used = quantised_bits(width, measured.hidden_size)
            # A ratio that was computed from these very bits must buy them despite rounding.
            if used <= bits * (1 + 1e-9):
                return Outcome(used, measured.quantisation_error(width), f"{width} bits")
        return None


CODERS: tuple[Coder, ...] = (
    PruneCoder("pruned, bf16", 16, (DENSE_BITS,)),
    PruneCoder("pruned, 8-bit", 8, (8,)),
    PruneCoder("pruned, 4-bit", 4, (8, 4)),
    LowRankCoder(),
    QuantiseCoder(),
)


def center_cost(center_bits: int, hidden_size: int) -> float:
    """Bits per center weight, scales included."""
    return DENSE_BITS if center_bits == DENSE_BITS else quantised_bits(center_bits, hidden_size)


def stored_center(center: Tensor, center_bits: int, hidden_size: int) -> Tensor:
    """The center as a checkpoint would hold it: ``[rows, P*H]`` fp32, rounded to bf16 or quantised."""
    if center_bits == DENSE_BITS:
        return center.bfloat16().float()
    return quantise(center.reshape(-1, hidden_size), center_bits).reshape(center.shape)
