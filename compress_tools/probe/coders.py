"""What a coder would lose on a matrix at a given number of bits per weight, read off measured energy curves.

Nothing is encoded here. Pruning and low rank follow from sorted energies, so that one sort and one factorisation
answer for every size (rounding of stored values to bf16, a few 1e-6, is left out). Quantisation is carried out, on
a sample of rows.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from compress_tools.errors import ConfigError
from compress_tools.format.tensors import mask_row_bytes
from compress_tools.probe.matrix import GROUP, SCALE_BITS, MeasuredMatrix, quantise, quantised_bits
from compress_tools.residuals.budget import affordable_rank, kept_values

DENSE_BITS = 16  # bf16, the unit of every byte ratio here
QUANTISED_BITS = (8, 4, 3, 2)


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
