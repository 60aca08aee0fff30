"""Is a center worth it? Residual energy, energy curves and predicted errors of sampled experts, before compressing."""

import time
from dataclasses import replace

import torch
from torch import Tensor

from compress_tools.center.barycenter import (
    CenterOptions,
    CenterResult,
    barycenter,
    identity_perm,
    mean_of_aligned,
    spread,
)
from compress_tools.config import make_config
from compress_tools.format.dtypes import DTYPES
from compress_tools.numerics.sampling import choose, spaced
from compress_tools.numerics.work import Work
from compress_tools.output.target import CompressionTarget, make_target
from compress_tools.planner.candidates import Sizes
from compress_tools.planner.measure import Sample
from compress_tools.probe.config import ProbeConfig
from compress_tools.probe.energy import CurveMean, magnitude_curve, spectrum_curve
from compress_tools.probe.predictions import (
    AlignedSample,
    Candidate,
    candidates_for,
    plain_ratios,
    predict,
    relative_errors,
)
from compress_tools.probe.result import LayerProbe, ProbeResult, ResidualShares
from compress_tools.probe.sample import (
    MAX_WHOLE_ROWS,
    SAMPLED_ROWS,
    ExpertSample,
    comparison_columns,
    random_experts,
    sample_experts,
)
from compress_tools.progress.listener import ProgressListener, Silent
from compress_tools.source.design_matrix import expert_to_rows, rows_to_design
from compress_tools.source.files import CheckpointFiles
from compress_tools.source.source_reader import SourceReader

# A few are enough to judge; the random control is stopped at the same one.
CENTER = CenterOptions(max_iterations=3, tolerance=1e-3)

# Candidates are measured on so many of the sampled experts, and on so many weights of each; low rank on all rows of
# the planner's number of experts.
MEASURED_EXPERTS = 4
MEASURED_WEIGHTS = 1 << 17


def probe(src: str | CheckpointFiles, config: ProbeConfig, progress: ProgressListener | None = None) -> ProbeResult:
    """Measure sampled experts of sampled layers. Holds one layer's sample in memory; reads only sampled experts.

    Args:
        src: checkpoint directory, or a model of the hub, of which the sampled experts alone are fetched.
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
    target = make_target(SourceReader(src), make_config(layers=config.layers))
    source, layers = target.source, spaced(list(target.fmt.layers), config.max_layers)
    sampler = _Sampler(target, config)
    for remark in target.remarks():
        progress.say(remark)
    progress.start(len(layers) + 1, "sample")
    probes: list[LayerProbe] = []
    errors: list[dict[Candidate, float]] = []
    norms: list[Tensor] = []
    for layer in layers:
        progress.stage("center", None, layer)
        sample = sampler.layer(layer)
        made, measured = _probe_layer(sampler, layer, sample, progress)
        probes.append(made)
        errors.append(measured)
        norms.append(sample.row_norms)
        del sample
        progress.shard_done()
    progress.stage("control: unrelated experts", None)
    control, _ = _residual(sampler.random(norms[0]), config.workers, progress)
    progress.shard_done()
    predictions = predict(errors, sampler.ratios, sampler.dense_bytes)
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
        layers=[replace(made, predictions=own) for made, own in zip(probes, predictions, strict=True)],
        seconds=time.perf_counter() - start,
    )


class _Sampler:
    """Which experts, rows, columns and candidates; the same in every layer and in the control."""

    def __init__(self, target: CompressionTarget, config: ProbeConfig) -> None:
        source, sizes = target.source, target.source.sizes
        size_h, size_i, width = sizes.hidden_size, sizes.intermediate_size, len(source.projections)
        self.source, self.config = source, config
        self.shape = (size_i, width * size_h)
        self.experts = choose(sizes.num_experts, config.sampled_experts(sizes.num_experts), config.seed).tolist()
        self.rows: Tensor | None = None
        self.columns: Tensor | None = None
        if size_i > MAX_WHOLE_ROWS:
            self.rows = choose(size_i, SAMPLED_ROWS, config.seed)
            # A random matrix keeps its spectrum's shape when rows and columns are thinned alike.
            some = choose(size_h, max(1, round(size_h * SAMPLED_ROWS / size_i)), config.seed + 1)
            self.columns = torch.cat([some + number * size_h for number in range(width)])
        self._comparison = comparison_columns(width * size_h, config.seed + 2)
        stored = Sizes(target.fmt)
        self.dense_bytes = sum(map(source.reader.nbytes, source.expected(source.layers[0])))
        self.ratios = tuple(sorted(set(config.bytes_ratio))) or plain_ratios(stored, self.dense_bytes)
        self.candidates = candidates_for(stored, self.dense_bytes, self.ratios)
        self._sample = Sample(
            MEASURED_EXPERTS,
            max(1, MEASURED_WEIGHTS // self.shape[1]),
            DTYPES[target.fmt.dtype],
            config.seed,
            config.workers,
        )

    def layer(self, layer: int) -> ExpertSample:
        def read(number: int) -> Tensor:
            return rows_to_design(expert_to_rows(self.source.read_expert(layer, self.experts[number])))

        return sample_experts(read, len(self.experts), self.rows, self._comparison, self.config.device)

    def random(self, row_norms: Tensor) -> ExpertSample:
        """Unrelated experts of these row norms."""
        read = random_experts(row_norms, self.shape[1], self.config.seed)
        return sample_experts(read, len(row_norms), self.rows, self._comparison, self.config.device)

    def thinned(self, matrix: Tensor) -> Tensor:
        """What singular values are taken of."""
        return matrix if self.columns is None else matrix[:, self.columns.to(matrix.device)]

    def errors(self, aligned: AlignedSample, progress: ProgressListener) -> dict[Candidate, float]:
        """Every candidate's error on one layer's sample."""
        total = self.source.sizes.num_experts
        rowwise = [one for one in self.candidates if not one.coder.factorises]
        low_rank = [one for one in self.candidates if one.coder.factorises]
        return relative_errors(aligned, rowwise, self._sample, total, progress.step) | relative_errors(
            aligned.thinned(self.columns), low_rank, self._sample, total, progress.step
        )


def _residual(sample: ExpertSample, workers: int, progress: ProgressListener) -> tuple[ResidualShares, CenterResult]:
    """Shares, and the center of ``sample.design``."""
    found = barycenter(sample.design, CENTER, Work(workers, progress))
    identity = identity_perm(*sample.unaligned.shape[:2])
    before = spread(sample.unaligned, identity, mean_of_aligned(sample.unaligned, identity))
    shares = [
        energy / total if total else 0.0
        for energy, total in ((before, _energy(sample.unaligned)), (found.objective[-1], _energy(sample.design)))
    ]
    return ResidualShares(*shares), found


def _energy(design: Tensor) -> float:
    return float(sum(expert.double().square().sum().item() for expert in design))


def _probe_layer(
    sampler: _Sampler, layer: int, sample: ExpertSample, progress: ProgressListener
) -> tuple[LayerProbe, dict[Candidate, float]]:
    """One layer's sample without its predictions, and every candidate's error."""
    residual, found = _residual(sample, sampler.config.workers, progress)
    spectrum, magnitude = CurveMean(), CurveMean()

    def draw(name: str, matrix: Tensor) -> None:
        spectrum.add(name, spectrum_curve(sampler.thinned(matrix)))
        magnitude.add(name, magnitude_curve(matrix))

    progress.stage("energy", len(sample.design), layer)
    for expert, perm in zip(sample.design, found.perm, strict=True):
        aligned = expert[perm.to(expert.device)]
        draw("weight", aligned)
        draw("residual", aligned if found.center is None else aligned - found.center)
        progress.step()
    draw("random", _random_like(sample.design[0], sampler.config.seed))
    progress.stage(f"measuring {len(sampler.candidates)} candidates", None, layer)
    errors = sampler.errors(AlignedSample(sample.design, found, sampler.source.projections), progress)
    return LayerProbe(layer, residual, spectrum.curves(), magnitude.curves(), []), errors


def _random_like(matrix: Tensor, seed: int) -> Tensor:
    read = random_experts(matrix.norm(dim=1, keepdim=True).T.cpu(), matrix.shape[1], seed)
    return read(0).to(matrix.device)
