"""What each coder would lose at a size: the planner's candidates, measured by the planner on the probe's sample."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from compress_tools.center.barycenter import CenterResult, spread
from compress_tools.config import CompressionConfig, make_config
from compress_tools.format.schema import Projection
from compress_tools.planner.candidates import CenterBits, Coder, Sizes, menu
from compress_tools.planner.config import MENU_METHODS
from compress_tools.planner.measure import Sample, measure_layer
from compress_tools.probe.verdict import Prediction

CENTERS: tuple[CenterBits, ...] = (0, 4, 8, 16)
PLAIN_BITS = (2, 3, 4, 8)

# A candidate that leaves more than this share of the bytes unused is not worth measuring.
_NEAR = 0.85
# A ratio that was computed from a candidate's own bytes must buy it despite rounding.
_ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class Candidate:
    """One coder for whole layers, with one center.

    Attributes:
        center_bits: of the center; 0 for none.
        coder: offered with this center alone.
        nbytes: of a layer, everything counted.
    """

    center_bits: CenterBits
    coder: Coder
    nbytes: int

    @property
    def kind(self) -> tuple[str, CenterBits]:
        """Method and center: one row of the table."""
        return self.coder.config.method, self.center_bits

    @property
    def setting(self) -> str:
        """What the bytes buy, for people."""
        config = self.coder.config
        codes = f"{config.bits} bits by {config.group_size or 'row'}"
        words = {
            "prune": f"keeps {config.retain_ratio:.1%}, {config.value_bits}-bit",
            "low-rank": f"keeps {config.retain_ratio:.1%}, {config.factor_bits}-bit",
            "quantize": codes,
            "trellis": codes,
            "low-rank+quantize": f"{config.retain_ratio:.0%} + {codes}",
            "low-rank+trellis": f"{config.retain_ratio:.0%} + {codes}",
        }
        return words[config.method]


def plain_ratios(sizes: Sizes, dense_bytes: int) -> tuple[float, ...]:
    """Byte ratios of plain 2-, 3-, 4- and 8-bit quantisation in groups of 128, which a user would pick today."""
    plain = (make_config(method="quantize", bits=bits, group_size=128) for bits in PLAIN_BITS)
    return tuple(sizes.uniform(Coder(config, joint=False, centers=(0,)), 0) / dense_bytes for config in plain)


def candidates_for(sizes: Sizes, dense_bytes: int, ratios: Iterable[float]) -> tuple[Candidate, ...]:
    """The planner's menu at each size: of every method and center what uses the bytes up, or nearly.

    Args:
        sizes: of the model.
        dense_bytes: of a layer as it is.
        ratios: the sizes, as shares of ``dense_bytes``.
    """
    found: dict[Candidate, None] = {}
    for ratio in ratios:
        budget = ratio * dense_bytes * _ROUNDING
        offered = [
            Candidate(bits, replace(coder, centers=(bits,)), sizes.uniform(coder, bits))
            for coder in menu(sizes, MENU_METHODS, CENTERS, budget)
            for bits in coder.centers
            if not _outdone(coder.config)
        ]
        fitting = [one for one in offered if one.nbytes <= budget]
        most = {one.kind: max(other.nbytes for other in fitting if other.kind == one.kind) for one in fitting}
        found |= dict.fromkeys(one for one in fitting if one.nbytes >= _NEAR * most[one.kind])
    return tuple(found)


def _outdone(config: CompressionConfig) -> bool:
    """Factors of 16 bits: those of 8 buy twice the rank, and their rounding is far below what either leaves."""
    return config.method == "low-rank" and config.factor_bits == 16


@dataclass(frozen=True)
class AlignedSample:
    """Some experts of a layer and their center.

    Attributes:
        design: ``[n, rows, P*H]``; of columns as many as there are.
        found: center and alignment.
        projections: P, in design-matrix order.
    """

    design: Tensor
    found: CenterResult
    projections: tuple[Projection, ...]

    def thinned(self, columns: Tensor | None) -> "AlignedSample":
        """Some columns of the design matrix, equally many of each projection; None for all."""
        if columns is None or self.found.center is None:
            return self
        columns = columns.to(self.design.device)
        center = replace(self.found, center=self.found.center[:, columns])
        return AlignedSample(self.design[:, :, columns], center, self.projections)

    def storable(self, coder: Coder) -> bool:
        """Whether the coder keeps anything of matrices this small."""
        rows, columns = self.design.shape[1:]
        return coder.keeps_any(self.projections, rows, columns // len(self.projections))


def relative_errors(
    aligned: AlignedSample,
    candidates: Iterable[Candidate],
    sample: Sample,
    num_experts: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[Candidate, float]:
    """Squared error over weight energy of each candidate, as of all experts.

    Args:
        aligned: what is measured.
        candidates: to be measured.
        sample: how much of it.
        num_experts: E; the residual's energy around the sampled experts' center is scaled up to that around all's.
        advance: called after each expert.
    """
    own = [candidate for candidate in candidates if aligned.storable(candidate.coder)]
    if not own:
        return {}
    coders = tuple(candidate.coder for candidate in own)
    measured = measure_layer(aligned.design, aligned.found, aligned.projections, coders, sample, advance)
    energy = float(measured.energies.sum())
    center = aligned.found.center
    around = 0.0 if center is None else spread(aligned.design, aligned.found.perm, center, sample.workers)
    growth = {0: 1.0}
    for bits, residuals in measured.residuals.items():
        residual = float(residuals.sum())
        shared_out = min(around, residual)
        # A center's rounding is the same for any number of experts; the rest grows with them.
        grown = mean_correction(len(aligned.design), num_experts) * shared_out + residual - shared_out
        growth[bits] = grown / residual if bits and residual else 1.0
    return {
        one: growth[one.center_bits] * float(measured.errors[one.center_bits, one.coder].sum()) / energy
        if energy
        else 0.0
        for one in own
    }


def predict(
    layers: Sequence[dict[Candidate, float]], ratios: Iterable[float], dense_bytes: int
) -> list[list[Prediction]]:
    """For each layer, of every method and center and at every size, the candidate of least error over all layers.

    Args:
        layers: the errors of each layer's candidates.
        ratios: the sizes.
        dense_bytes: of a layer as it is.
    """
    everywhere = [one for one in layers[0] if all(one in layer for layer in layers)]
    found: list[list[Prediction]] = [[] for _ in layers]
    for ratio in ratios:
        fitting = [one for one in everywhere if one.nbytes <= ratio * dense_bytes * _ROUNDING]
        for kind in dict.fromkeys(one.kind for one in fitting):
            some = [one for one in fitting if one.kind == kind]
            best = min(some, key=lambda one: sum(layer[one] for layer in layers))
            for own, layer in zip(found, layers, strict=True):
                method, bits = kind
                used = best.nbytes / dense_bytes
                own.append(Prediction(method, bits or None, ratio, used, best.setting, layer[best]))
    return found


def mean_correction(sampled: int, total: int) -> float:
    """Factor from residual energy around the mean of ``sampled`` experts to that around the mean of ``total``.

    A mean of n takes 1/n of the energy of what its members do not share, so fewer experts look better centered:
    the factor is ``(1 - 1/total) / (1 - 1/sampled)``, exact for independent equal parts around a common one.
    """
    return (1 - 1 / total) / (1 - 1 / sampled)
