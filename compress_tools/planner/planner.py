"""The whole way of a plan: menu, one layer at a time measured, then the least total error within the budget."""

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil, inf

import torch
from torch import Tensor

from compress_tools.center.barycenter import CenterKind, CenterOptions, find_center
from compress_tools.config import CompressionConfig, check_device, make_config
from compress_tools.errors import ConfigError
from compress_tools.format.dtypes import DTYPES
from compress_tools.importance import LayerImportance
from compress_tools.numerics.clock import StageClock
from compress_tools.numerics.work import Work
from compress_tools.output.target import CompressionTarget, make_target
from compress_tools.planner.allocate import Allocation, allocate, smallest
from compress_tools.planner.candidates import CenterBits, Coder, Sizes, menu
from compress_tools.planner.center_worth import aligns_quickly, could_pay, hopeful_shares, skipped_text
from compress_tools.planner.choices import Choice, Groups, Rated, expert_groups
from compress_tools.planner.config import (
    CALIBRATED_METHODS,
    CALIBRATED_METHODS_ABOVE,
    Bounds,
    LayersBudget,
    PlannerConfig,
    layer_bounds,
)
from compress_tools.planner.counted import Calibration, counted_by_output, open_calibration
from compress_tools.planner.estimate import layer_seconds
from compress_tools.planner.frontier import Frontier, Point
from compress_tools.planner.low_rank_worth import worth_factorising
from compress_tools.planner.measure import LayerMeasurement, Sample, measure_layer
from compress_tools.planner.output_weights import LayerInputs, open_inputs, output_weights, unrouted_text
from compress_tools.planner.planned import Planned, PlannedLayer
from compress_tools.planner.target_size import as_ratio, asked_for, ratio_of
from compress_tools.progress.listener import ProgressListener, Silent
from compress_tools.progress.text import human_s
from compress_tools.source.layer_weights import LayerWeights, read_layer
from compress_tools.source.reader import CheckpointReader


@dataclass(frozen=True)
class LayerChoices:
    """What was measured of one layer, boiled down.

    Attributes:
        choices: the undominated ones; None leaves the layer as it is.
        uniform: every single coder's.
        exact: nothing was scaled up from a sample.
        unrouted: experts that the calibration hardly routes to, see ``output_weights.LEAST_ROUTING``.
        skipped: why no center was looked for; empty where one was, or none was wanted.
    """

    choices: Frontier[Choice | None]
    uniform: dict[tuple[CenterBits, Coder], Point[Choice]]
    exact: bool
    unrouted: tuple[int, ...] = ()
    skipped: str = ""


def find_plan(
    reader: CheckpointReader,
    config: CompressionConfig,
    request: PlannerConfig,
    progress: ProgressListener | None = None,
) -> Planned:
    """Measure every candidate on every layer, and choose.

    The total to be least is the sum over layers of their relative squared errors (or relative effects on the
    layers' outputs). The chosen plan is never above the best single coder of the menu on these measurements, which
    are the written checkpoint's errors where ``Planned.exact``.

    Args:
        reader: the source checkpoint.
        config: layers, how centers are found, seed, device, workers.
        request: budget, bounds, objective.
        progress: told of layers and experts.
    Raises:
        ConfigError: no plan keeps to budget and bounds; says which would.
        UnsupportedArchitectureError, CheckpointError, NumericalError: see errors.py.
    """
    check_device(config.device)
    base = _base_plan(reader, config)
    request = _of_all_experts(as_ratio(request, base), base)
    return choose(measure(base, config, request, progress or Silent()), request)


def _of_all_experts(request: PlannerConfig, base: CompressionTarget) -> PlannerConfig:
    """A share of some layers' bytes as that of all experts'."""
    if not isinstance(request, LayersBudget):
        return request
    dense = _dense_bytes(base)
    own = sum(dense[layer] for layer in base.fmt.layers)
    ratio = 1 - (1 - ratio_of(request)) * own / sum(dense.values())
    return request.model_copy(update={"target_bytes_ratio": ratio})


def _dense_bytes(base: CompressionTarget) -> dict[int, int]:
    """Bytes of every MoE layer as it is."""
    source = base.source
    return {layer: sum(map(source.reader.nbytes, source.expected(layer))) for layer in source.layers}


@dataclass(frozen=True)
class Measured:
    """Everything that a choice is made from.

    Attributes:
        sizes: of the model.
        layers: what was measured of each layer to be planned, by index, ascending.
        dense: bytes of every MoE layer as it is.
    """

    sizes: Sizes
    layers: dict[int, LayerChoices]
    dense: dict[int, int]

    def budget(self, ratio: float) -> float:
        """Bytes that the planned layers may take when all experts are to take this share."""
        return _budget(ratio, self.dense, self.layers)


def _budget(ratio: float, dense: dict[int, int], planned: Collection[int]) -> float:
    untouched = sum(nbytes for layer, nbytes in dense.items() if layer not in planned)
    return ratio * sum(dense.values()) - untouched


def measure(
    base: CompressionTarget, config: CompressionConfig, request: PlannerConfig, progress: ProgressListener
) -> Measured:
    """Measure the menu on each layer that ``base`` compresses; one layer at a time is in memory."""
    source, sizes = base.source, Sizes(base.fmt)
    dense = _dense_bytes(base)
    selected = sorted(base.fmt.layers)
    bounds = layer_bounds(request.layer_bytes_ratio, selected)  # refused before the first long step
    budget = _budget(ratio_of(request), dense, selected)
    centers: tuple[CenterBits, ...] = (0,) if config.center == "none" else (0, 4, 8, 16)
    layer_budget = max(budget, 0) / len(selected)
    calibration = open_calibration(request, source, selected)
    methods = request.coder_names() if calibration is None or request.coders != "all" else _calibrated_methods(request)
    coders = menu(sizes, methods, centers, layer_budget)
    inputs = None
    if calibration is None:
        inputs = open_inputs(request, source, config.seed)
    elif any(calibration.layer(layer) is None for layer in selected):
        inputs = open_inputs(request.model_copy(update={"calibration": None}), source, config.seed)
    measuring = _Measuring(base, config, request, coders, inputs, calibration, sizes, layer_budget, bounds, progress)
    progress.say(measuring.expectation(len(selected)))
    if calibration is not None and request.coders == "all":
        progress.say(f"with a calibration the menu is {' and '.join(methods)}; --coders names others")
    if calibration is not None and calibration.coefficients:
        progress.say("errors are KL in nats, by the coefficients of the calibration's layers")
    layers: dict[int, LayerChoices] = {}
    begun = time.monotonic()
    for layer in source.as_they_lie(selected):
        layers[layer] = measuring.layer(layer, dense[layer])
        if len(layers) == 1 and len(selected) > 1:
            spent, left = time.monotonic() - begun, len(selected) - 1
            progress.say(f"measuring layer {layer} took {human_s(spent)}; {left} more: about {human_s(left * spent)}")
    return Measured(sizes, dict(sorted(layers.items())), dense)


def _calibrated_methods(request: PlannerConfig) -> tuple[str, ...]:
    above, methods = CALIBRATED_METHODS_ABOVE
    return methods if ratio_of(request) > above else CALIBRATED_METHODS


def choose(measured: Measured, request: PlannerConfig) -> Planned:
    """The least total error within the budget and the bounds.

    Raises:
        ConfigError: nothing is within; says what would be.
    """
    ratio = ratio_of(request)
    layers, dense, budget = measured.layers, measured.dense, measured.budget(ratio)
    bounds = {
        layer: (own.least * dense[layer], own.most * dense[layer])
        for layer, own in layer_bounds(request.layer_bytes_ratio, list(layers)).items()
    }
    best = _best_uniform(layers, bounds, budget)
    found: Allocation[Choice | None] | None
    least: float
    if request.uniform:
        found, least = best, _smallest_uniform(layers, bounds)
    else:
        choices = [own.choices.within(*bounds[layer]) for layer, own in layers.items()]
        for layer, own in zip(layers, choices, strict=True):
            if not own.picks:
                raise ConfigError(f"--layer-bytes-ratio: nothing that layer {layer} could be stored as is within")
        least = smallest(choices)
        found = allocate(choices, budget) if least <= budget else None
        if found is not None and best is not None and best.error < found.error:
            found = best
    if found is None:
        # rounded up, so that asking for it succeeds
        needed = ratio + (least - budget) / sum(dense.values())
        raise ConfigError(
            f"{asked_for(request)}: too small for what may be chosen; the smallest possible is "
            f"{'' if request.target_size is None else '--target-bytes-ratio '}{ceil(needed * 1e4) / 1e4}"
            if least < inf
            else f"--uniform: no single coder keeps to --layer-bytes-ratio {request.layer_bytes_ratio}"
        )
    planned = {layer: PlannedLayer(None, nbytes, nbytes, 0.0) for layer, nbytes in dense.items()}
    for layer, pick, nbytes, error in zip(layers, found.picks, found.nbytes, found.errors, strict=True):
        planned[layer] = PlannedLayer(None if pick is None else pick.spec(measured.sizes), nbytes, dense[layer], error)
    label = None if best is None else (_label(best.picks[0]), best.error / len(planned))
    unrouted = {layer: own.unrouted for layer, own in layers.items() if own.unrouted}
    skipped = {layer: own.skipped for layer, own in layers.items() if own.skipped}
    return Planned(planned, label, all(layer.exact for layer in layers.values()), unrouted, skipped)


def _base_plan(reader: CheckpointReader, config: CompressionConfig) -> CompressionTarget:
    """Any valid plan of the layers asked for: it tells sizes, dtype and names, and has checked the source."""
    uniform = make_config(method="quantize", layers=config.layers, workers=config.workers, rest_bits=config.rest_bits)
    return make_target(reader, uniform)


@dataclass(frozen=True)
class _LayerRun:
    """One layer that is measured."""

    layer: int
    design: Tensor
    importance: LayerImportance | None
    work: Work


@dataclass(frozen=True)
class _Measuring:
    """What is the same for every layer that is measured."""

    base: CompressionTarget
    config: CompressionConfig
    request: PlannerConfig
    coders: tuple[Coder, ...]
    inputs: LayerInputs | None
    calibration: Calibration | None
    sizes: Sizes
    layer_budget: float
    bounds: Mapping[int, Bounds]
    progress: ProgressListener

    @property
    def candidates(self) -> int:
        """Ways to store a layer that are measured."""
        return sum(len(coder.centers) for coder in self.coders)

    @property
    def sample(self) -> Sample:
        """How much of a layer is measured."""
        request, dtype = self.request, DTYPES[self.base.fmt.dtype]
        return Sample(request.measure_experts, request.measure_rows, dtype, self.config.seed, self.config.workers)

    def expectation(self, layers: int) -> str:
        """What is about to be done, and how long it may take."""
        seconds = layers * layer_seconds(self.sizes, self.coders, self.config, self.sample)
        return (
            f"planning: {layers} layers, {self.candidates} candidates each: roughly {human_s(seconds)}, "
            f"estimated from sizes with {self.config.workers} workers"
        )

    def layer(self, layer: int, dense_bytes: int) -> LayerChoices:
        """Measure one layer of ``dense_bytes`` bytes."""
        config, progress, clock = self.config, self.progress, StageClock()
        read = read_layer(self.base.source, layer, DTYPES[self.base.fmt.dtype], config.device, progress, clock)
        importance = None if self.calibration is None else self.calibration.layer(layer)
        run = _LayerRun(layer, read.design, importance, Work(config.workers, progress, clock))
        decides = not (config.center in ("none", "mean") or self.request.uniform or aligns_quickly(read.design))
        alone = tuple(replace(coder, centers=(0,)) for coder in self.coders if 0 in coder.centers)
        kind: CenterKind = "none" if decides else config.center
        measured = self._alone(run, alone) if kind == "none" else self._measure(run, kind, self.coders)
        weights, unrouted = self._weights(read, layer, measured.energies, importance)
        if unrouted:
            progress.say(f"layer {layer}: {unrouted_text(unrouted)}")
        skipped = ""
        if decides:
            shares = self._shares_that_do_not_pay(run, dense_bytes, *self._rated(measured, weights))
            if shares is None:
                rest = ((coder, tuple(bits for bits in coder.centers if bits)) for coder in self.coders)
                centered = tuple(replace(coder, centers=bits) for coder, bits in rest if bits)
                measured = measured.joined(self._measure(run, config.center, centered))
            else:
                skipped = skipped_text(shares)
                progress.say(f"layer {layer}: {skipped}")
        groups, rated = self._rated(measured, weights)
        uniform = {key: rated.uniform(*key) for key in measured.errors}
        return LayerChoices(rated.choices(groups, dense_bytes), uniform, measured.exact, unrouted, skipped)

    def _alone(self, run: _LayerRun, coders: tuple[Coder, ...]) -> LayerMeasurement:
        """Candidates without a center; of a large layer low rank only where its spectra leave it a chance."""
        low_rank = tuple(coder for coder in coders if coder.factorises)
        codes = tuple(coder for coder in coders if not coder.factorises)
        experts, rows = run.design.shape[:2]
        sampled = 0 < self.sample.experts < experts or 0 < self.sample.rows < rows
        if not (sampled and low_rank and any(not coder.joint for coder in codes)):
            return self._measure(run, "none", coders)
        measured = self._measure(run, "none", codes)
        self.progress.stage("whether low rank pays, by spectra", None, run.layer)
        kept = worth_factorising(low_rank, measured, run.design, self.sizes, self.layer_budget, self.config.workers)
        return measured.joined(self._measure(run, "none", kept)) if kept else measured

    def _rated(self, measured: LayerMeasurement, weights: Tensor) -> tuple[Groups, Rated]:
        hardness = (measured.residuals[max(measured.residuals)] * weights).sum(1)
        return expert_groups(hardness, self.request.expert_groups), Rated(measured, weights, self.sizes)

    def _shares_that_do_not_pay(
        self, run: _LayerRun, dense_bytes: int, groups: Groups, without: Rated
    ) -> Tensor | None:
        """Shares of energy that residuals would hold, where a sample shows that no center can pay; else None."""
        self.progress.stage("whether a center pays, on a sample", None, run.layer)
        shares = hopeful_shares(run.design, len(self.sizes.projections), self.config.workers)
        own = self.bounds[run.layer]
        budget = min(max(self.layer_budget, own.least * dense_bytes), own.most * dense_bytes)
        return None if could_pay(without, self.coders, shares, groups, dense_bytes, budget) else shares

    def _measure(self, run: _LayerRun, kind: CenterKind, coders: tuple[Coder, ...]) -> LayerMeasurement:
        config, progress = self.config, self.progress
        progress.stage("center", None, run.layer)
        found = find_center(run.design, CenterOptions(kind, config.max_iterations, config.tolerance), run.work)
        count = sum(len(coder.centers) for coder in coders)
        progress.stage(f"measuring {count} candidates", None, run.layer)
        projections = self.sizes.projections
        return measure_layer(run.design, found, projections, coders, self.sample, progress.step, run.importance)

    def _weights(
        self, read: LayerWeights, layer: int, energies: Tensor, importance: LayerImportance | None
    ) -> tuple[Tensor, tuple[int, ...]]:
        """What a unit of squared error counts, ``[E, P]``, and experts that are hardly routed to."""
        projections, workers = self.sizes.projections, self.config.workers
        factor = 1.0 if self.calibration is None else self.calibration.factor(layer)
        if importance is not None and self.request.optimize == "output":
            coefficient = importance.coefficient if self.calibration and self.calibration.coefficients else None
            counted = counted_by_output(read.design, projections, importance, coefficient, workers)
            return torch.full_like(energies, counted), importance.unrouted
        if self.inputs is None:
            unrouted = () if importance is None else importance.unrouted
            return torch.ones_like(energies) / energies.sum(), unrouted
        weights, unrouted = output_weights(read, projections, self.inputs, layer, workers)
        return weights * factor, unrouted


def _uniforms(
    layers: dict[int, LayerChoices], bounds: dict[int, tuple[float, float]]
) -> Iterator[tuple[int, Allocation[Choice]]]:
    """Every single coder that was measured on all layers and keeps to the bounds: its bytes, and itself."""
    for key in next(iter(layers.values())).uniform:
        if not all(key in choices.uniform for choices in layers.values()):
            continue
        own = {layer: choices.uniform[key] for layer, choices in layers.items()}
        if all(bounds[layer][0] <= point.nbytes <= bounds[layer][1] for layer, point in own.items()):
            points = tuple(own.values())
            made = Allocation(
                tuple(point.nbytes for point in points),
                tuple(point.error for point in points),
                tuple(point.pick for point in points),
            )
            yield sum(made.nbytes), made


def _best_uniform(
    layers: dict[int, LayerChoices], bounds: dict[int, tuple[float, float]], budget: float
) -> Allocation[Choice] | None:
    fitting = [made for nbytes, made in _uniforms(layers, bounds) if nbytes <= budget]
    return min(fitting, key=lambda made: made.error, default=None)


def _smallest_uniform(layers: dict[int, LayerChoices], bounds: dict[int, tuple[float, float]]) -> float:
    return min((nbytes for nbytes, _ in _uniforms(layers, bounds)), default=inf)


def _label(choice: Choice) -> str:
    center = choice.centers[0]
    return f"{f'center of {center} bits' if center else 'no center'}; {choice.coders[0][0].label}"
