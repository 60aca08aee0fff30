"""Is a center worth it? Residual energy, energy curves and predicted errors of sampled experts, before compressing."""

import time
from collections import defaultdict
from itertools import product

from torch import Tensor

from compress_tools.center.barycenter import CenterOptions, barycenter, identity_perm, mean_of_aligned, spread
from compress_tools.config import make_config
from compress_tools.numerics.sampling import choose, spaced
from compress_tools.numerics.work import Work
from compress_tools.output.target import make_target
from compress_tools.probe.coders import (
    CODERS,
    DENSE_BITS,
    QUANTISED_BITS,
    center_cost,
    stored_center,
)
from compress_tools.probe.config import ProbeConfig
from compress_tools.probe.matrix import MeasuredMatrix, quantised_bits
from compress_tools.probe.result import SHARES, Curves, LayerProbe, ProbeResult, ResidualShares, mean_correction
from compress_tools.probe.sample import (
    MAX_WHOLE_ROWS,
    SAMPLED_ROWS,
    ExpertSample,
    comparison_columns,
    random_experts,
    sample_experts,
)
from compress_tools.probe.verdict import Prediction
from compress_tools.progress.listener import ProgressListener, Silent
from compress_tools.source.design_matrix import expert_to_rows, rows_to_design
from compress_tools.source.moe_source import MoESource
from compress_tools.source.reader import CheckpointReader

# A few are enough to judge; the random control is stopped at the same one.
CENTER = CenterOptions(max_iterations=3, tolerance=1e-3)


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
    target = make_target(CheckpointReader(src), make_config(layers=config.layers))
    source, layers = target.source, spaced(list(target.fmt.layers), config.max_layers)
    sampler = _Sampler(source, config)
    progress.start(len(layers) + 1, "sample")
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
    found = barycenter(sample.design, CENTER, Work(workers, progress))
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
    progress.stage("coders", count, layer)
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
