"""What a probe found: plain numbers, their means over layers, and the answer."""

from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from compress_tools.probe.energy import SHARES, Curves
from compress_tools.probe.predictions import mean_correction
from compress_tools.probe.verdict import Prediction, Verdict, judge


@dataclass(frozen=True)
class ResidualShares:
    """Residual energy over weight energy, of the n sampled experts around their own mean.

    Attributes:
        before: row i of one expert against row i of the others.
        after: rows aligned.
    """

    before: float
    after: float


@dataclass(frozen=True)
class LayerProbe:
    """One sampled layer.

    Attributes:
        layer: decoder layer index.
        residual: around the sampled experts' own center, before any rounding.
        spectrum: share of energy in the largest ``SHARES`` of singular values, of ``residual``, ``weight`` and
            ``random`` (gaussian, same shape and row norms); mean over sampled experts, one expert for random.
        magnitude: the same for entries by magnitude.
        predictions: errors by coder, with and without center, by size; for all E experts.
    """

    layer: int
    residual: ResidualShares
    spectrum: Curves
    magnitude: Curves
    predictions: list[Prediction]


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found. ``seconds`` is not part of ``content()``: it differs from run to run.

    Attributes:
        source: path as given.
        model: the family's name for people.
        num_layers: MoE layers of the model.
        num_experts: E.
        experts: numbers of the sampled experts.
        shape: ``(I, D)`` of a design matrix.
        rows: rows of each expert that took part; below I they are a sample.
        bytes_ratios: sizes that errors are predicted at, ascending.
        control: residual shares of unrelated experts, shape and row norms of the first sampled layer.
        layers: sampled layers.
        seconds: wall time.
    """

    source: str
    model: str
    num_layers: int
    num_experts: int
    experts: list[int]
    shape: tuple[int, int]
    rows: int
    bytes_ratios: tuple[float, ...]
    control: ResidualShares
    layers: list[LayerProbe]
    seconds: float

    @property
    def scale_to_all(self) -> float:
        """From a residual around the mean of n experts to one around the mean of E; see ``mean_correction``."""
        return mean_correction(len(self.experts), self.num_experts)

    @cached_property
    def predictions(self) -> list[Prediction]:
        """Mean over sampled layers."""
        found: dict[tuple[str, int | None, float], list[Prediction]] = defaultdict(list)
        for layer in self.layers:
            for one in layer.predictions:
                found[one.coder, one.center_bits, one.bytes_ratio].append(one)
        return [Prediction.mean(ones) for ones in found.values()]

    @cached_property
    def verdict(self) -> Verdict:
        """The answer, over all sampled layers."""
        after = sum(layer.residual.after for layer in self.layers) / len(self.layers)
        return judge(
            after * self.scale_to_all, self.control.after * self.scale_to_all, self.bytes_ratios, self.predictions
        )

    def content(self) -> dict[str, Any]:
        """Plain data for JSON, the same in every run."""
        found = {name: value for name, value in asdict(self).items() if name != "seconds"}
        return {
            **found,
            "shape": list(self.shape),
            "bytes_ratios": list(self.bytes_ratios),
            "shares": list(SHARES),
            "scale_to_all_experts": self.scale_to_all,
            "predictions": [asdict(one) for one in self.predictions],
            "verdict": asdict(self.verdict),
        }
