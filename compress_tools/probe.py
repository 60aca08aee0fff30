"""Is a center worth it? Residual energy, energy curves and predicted errors of sampled experts, before compressing."""

import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from typing import Any

from torch import Tensor

from compress_tools.architectures.layouts import MoESource
from compress_tools.barycenter import barycenter, identity_perm, mean_of_aligned, spread
from compress_tools.checkpoint_reader import CheckpointReader
from compress_tools.config import make_config
from compress_tools.design_matrix import expert_to_rows, rows_to_design
from compress_tools.plan import make_plan
from compress_tools.probe_coders import (
    CODERS,
    DENSE_BITS,
    QUANTISED_BITS,
    MeasuredMatrix,
    center_cost,
    quantised_bits,
    stored_center,
)
from compress_tools.probe_config import ProbeConfig, spaced
from compress_tools.probe_sample import (
    MAX_WHOLE_ROWS,
    SAMPLED_ROWS,
    ExpertSample,
    choose,
    comparison_columns,
    random_experts,
    sample_experts,
)
from compress_tools.probe_verdict import Prediction, Verdict, judge
from compress_tools.progress import ProgressListener, Silent

SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 1.0)
# Later iterations change a residual's energy in the third digit; the random control stops at the same one.
CENTER_ITERATIONS = 3
CENTER_TOLERANCE = 1e-3

Curves = dict[str, list[float]]


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


def mean_correction(sampled: int, total: int) -> float:
    """Factor from residual energy around the mean of ``sampled`` experts to that around the mean of ``total``.

    A mean of n takes 1/n of the energy of what its members do not share, so fewer experts look better centered:
    the factor is ``(1 - 1/total) / (1 - 1/sampled)``, exact for independent equal parts around a common one.
    """
    return (1 - 1 / total) / (1 - 1 / sampled)


def probe(src: str, config: ProbeConfig, progress: ProgressListener | None = None) -> ProbeResult:
    """Measure sampled experts of sampled layers. Holds one layer's sample in memory; reads only sampled experts.

    Args:
        src: checkpoint directory.
        config: what to sample.
        progress: told of layers and stages.
    Raises:
        ConfigError: the request does not fit the model.
        UnsupportedArchitectureError: not an MoE, or of an unknown family.
        CheckpointError: incomplete, or already quantised.
        NumericalError: a weight is NaN or infinite.
    """
    start = time.perf_counter()
    progress = progress or Silent()
    plan = make_plan(CheckpointReader(src), make_config(layers=config.layers))
    source, layers = plan.source, spaced(list(plan.fmt.layers), config.max_layers)
    sampler = _Sampler(source, config)
    progress.start(len(layers) + 1)
    probes: list[LayerProbe] = []
    norms = None
    for layer in layers:
        progress.stage(f"layer {layer}", None)
        sample = sampler.layer(layer)
        probes.append(_probe_layer(sampler, layer, sample, progress))
        norms = sample.row_norms if norms is None else norms
        del sample
        progress.shard_done()
    assert norms is not None  # select_layers gives at least one layer
    progress.stage("control: unrelated experts", None)
    control, _, _ = _residual(sampler.random(norms), config.workers, progress)
    progress.shard_done()
    return ProbeResult(
        source=str(src),
        model=source.architecture.title,
        num_layers=len(source.layers),
        num_experts=source.sizes.num_experts,
        experts=sampler.experts,
        shape=sampler.shape,
        rows=sampler.shape[0] if sampler.rows is None else len(sampler.rows),
        bytes_ratios=sampler.ratios,
        control=control,
        layers=probes,
        seconds=time.perf_counter() - start,
    )


class _Sampler:
    """Which experts, rows and columns; the same in every layer and in the control."""

    def __init__(self, source: MoESource, config: ProbeConfig) -> None:
        sizes = source.sizes
        self.source, self.config = source, config
        self.ratios = tuple(sorted(set(config.bytes_ratio))) or plain_ratios(sizes.hidden_size)
        self.shape = (sizes.intermediate_size, len(source.projections) * sizes.hidden_size)
        self.experts = choose(sizes.num_experts, config.sampled_experts(sizes.num_experts), config.seed).tolist()
        size_i, size_d = self.shape
        self.rows: Tensor | None = None
        self.spectrum_columns: Tensor | None = None
        if size_i > MAX_WHOLE_ROWS:
            self.rows = choose(size_i, SAMPLED_ROWS, config.seed)
            # A random matrix keeps its spectrum's shape when rows and columns are thinned alike.
            self.spectrum_columns = choose(size_d, max(1, round(size_d * SAMPLED_ROWS / size_i)), config.seed + 1)
        self._comparison = comparison_columns(size_d, config.seed + 2)

    def layer(self, layer: int) -> ExpertSample:
        def read(number: int) -> Tensor:
            return rows_to_design(expert_to_rows(self.source.read_expert(layer, self.experts[number])))

        return sample_experts(read, len(self.experts), self.rows, self._comparison, self.config.device)

    def random(self, row_norms: Tensor) -> ExpertSample:
        read = random_experts(row_norms, self.shape[1], self.config.seed)
        return sample_experts(read, len(row_norms), self.rows, self._comparison, self.config.device)

    def measured(self, matrix: Tensor) -> MeasuredMatrix:
        return MeasuredMatrix(matrix, self.source.sizes.hidden_size, self.spectrum_columns)


def _residual(sample: ExpertSample, workers: int, progress: ProgressListener) -> tuple[ResidualShares, Tensor, Tensor]:
    """Shares, center ``[rows, D]`` and perm ``[n, rows]``."""
    found = barycenter(sample.design, CENTER_ITERATIONS, CENTER_TOLERANCE, workers, progress.step)
    assert found.center is not None  # a barycenter always has one
    identity = identity_perm(*sample.unaligned.shape[:2])
    before = spread(sample.unaligned, identity, mean_of_aligned(sample.unaligned, identity))
    shares = [
        energy / total if total else 0.0
        for energy, total in ((before, _energy(sample.unaligned)), (found.objective[-1], _energy(sample.design)))
    ]
    return ResidualShares(*shares), found.center, found.perm


def _energy(design: Tensor) -> float:
    return sum(expert.double().square().sum().item() for expert in design)


def _probe_layer(sampler: _Sampler, layer: int, sample: ExpertSample, progress: ProgressListener) -> LayerProbe:
    config, hidden_size = sampler.config, sampler.source.sizes.hidden_size
    total_experts, count = sampler.source.sizes.num_experts, len(sampler.experts)
    residual, center, perm = _residual(sample, config.workers, progress)
    centers = {bits: stored_center(center, bits, hidden_size) for coder in CODERS for bits in coder.center_bits}
    spectrum, magnitude = _CurveMean(), _CurveMean()
    errors: dict[tuple[str, int | None, float], float] = defaultdict(float)
    settings: dict[tuple[str, int | None, float], tuple[float, str]] = {}
    # Bits per expert weight that each center takes.
    costs = {bits: center_cost(bits, hidden_size) / total_experts for bits in centers}
    rounding = {bits: (stored - center).double().square().sum().item() for bits, stored in centers.items()}
    progress.stage(f"layer {layer}: coders", count)
    for number in range(count):
        aligned = sample.design[number][perm[number].to(sample.design.device)]
        matrices: dict[int | None, MeasuredMatrix] = {None: sampler.measured(aligned)}
        matrices |= {bits: sampler.measured(aligned - stored) for bits, stored in centers.items()}
        for name, matrix in (("residual", matrices[DENSE_BITS]), ("weight", matrices[None])):
            spectrum.add(name, [matrix.spectrum.share(share) for share in SHARES])
            magnitude.add(name, [matrix.magnitudes.share(share) for share in SHARES])
        for coder, ratio in product(CODERS, sampler.ratios):
            for center_bits in (None, *coder.center_bits):
                matrix, cost = matrices[center_bits], costs.get(center_bits, 0.0)
                if outcome := coder.predict(matrix, DENSE_BITS * ratio - cost):
                    key = (coder.name, center_bits, ratio)
                    errors[key] += outcome.error * (
                        matrix.energy
                        if center_bits is None
                        # A center's rounding is the same for any number of experts; the rest grows with them.
                        else mean_correction(count, total_experts) * (matrix.energy - rounding[center_bits])
                        + rounding[center_bits]
                    )
                    settings[key] = ((outcome.bits + cost) / DENSE_BITS, outcome.setting)
        progress.step()
    energy = _energy(sample.design)
    random = sampler.measured(_random_like(sample.design[0], config.seed))
    spectrum.add("random", [random.spectrum.share(share) for share in SHARES])
    magnitude.add("random", [random.magnitudes.share(share) for share in SHARES])
    predictions = [
        Prediction(*key, *settings[key], error=error / energy if energy else 0.0) for key, error in errors.items()
    ]
    return LayerProbe(layer, residual, spectrum.curves(), magnitude.curves(), predictions)


def plain_ratios(hidden_size: int) -> tuple[float, ...]:
    """Byte ratios of plain 2-, 3-, 4- and 8-bit quantisation, the sizes that a user would pick today."""
    return tuple(quantised_bits(bits, hidden_size) / DENSE_BITS for bits in sorted(QUANTISED_BITS))


def _random_like(matrix: Tensor, seed: int) -> Tensor:
    read = random_experts(matrix.norm(dim=1, keepdim=True).T.cpu(), matrix.shape[1], seed)
    return read(0).to(matrix.device)


class _CurveMean:
    """Mean of curves by name."""

    def __init__(self) -> None:
        self._found: dict[str, list[list[float]]] = defaultdict(list)

    def add(self, name: str, curve: list[float]) -> None:
        self._found[name].append(curve)

    def curves(self) -> Curves:
        return {
            name: [sum(at) / len(curves) for at in zip(*curves, strict=True)] for name, curves in self._found.items()
        }
