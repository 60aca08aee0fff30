"""The whole way of a plan: menu, one layer at a time measured, then the least total error within the budget."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import ceil, inf

import torch

from compress_tools.center.barycenter import CenterOptions, find_center
from compress_tools.config import CompressionConfig, check_device, make_config
from compress_tools.errors import ConfigError
from compress_tools.format.tensors import DTYPES
from compress_tools.numerics.clock import StageClock
from compress_tools.numerics.work import Work
from compress_tools.output.target import CompressionTarget, make_target
from compress_tools.planner.allocate import Allocation, allocate, smallest
from compress_tools.planner.candidates import CenterBits, Coder, Sizes, menu
from compress_tools.planner.choices import Choice, expert_groups, layer_choices, uniform_choice
from compress_tools.planner.config import PlannerConfig, layer_bounds
from compress_tools.planner.frontier import Frontier
from compress_tools.planner.measure import Sample, measure_layer
from compress_tools.planner.output_weights import LayerInputs, open_inputs, output_weights
from compress_tools.planner.planned import Planned, PlannedLayer
from compress_tools.progress.listener import ProgressListener, Silent
from compress_tools.source.layer_weights import read_layer
from compress_tools.source.reader import CheckpointReader


@dataclass(frozen=True)
class LayerChoices:
    """What was measured of one layer, boiled down: undominated choices, and every single coder's."""

    choices: Frontier
    uniform: dict[tuple[CenterBits, Coder], tuple[int, float, Choice]]
    exact: bool


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
    return choose(measure(base, config, request, progress or Silent()), request)


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
    dense = {layer: sum(map(source.reader.nbytes, source.expected(layer))) for layer in source.layers}
    selected = sorted(base.fmt.layers)
    layer_bounds(request.layer_bytes_ratio, selected)  # refused before the first long step
    budget = _budget(request.target_bytes_ratio, dense, selected)
    centers = (0,) if config.center == "none" else (0, 4, 8, 16)
    coders = menu(sizes, request.coder_names(), centers, max(budget, 0) / len(selected))
    inputs = open_inputs(request, source, config.seed)
    layers = {
        layer: _measure_layer(base, config, request, layer, coders, inputs, sizes, dense[layer], progress)
        for layer in selected
    }
    return Measured(sizes, layers, dense)


def choose(measured: Measured, request: PlannerConfig) -> Planned:
    """The least total error within the budget and the bounds.

    Raises:
        ConfigError: nothing is within; says what would be.
    """
    layers, dense, budget = measured.layers, measured.dense, measured.budget(request.target_bytes_ratio)
    bounds = {
        layer: (own.least * dense[layer], own.most * dense[layer])
        for layer, own in layer_bounds(request.layer_bytes_ratio, list(layers)).items()
    }
    best = _best_uniform(layers, bounds, budget)
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
        needed = request.target_bytes_ratio + (least - budget) / sum(dense.values())
        raise ConfigError(
            f"--target-bytes-ratio {request.target_bytes_ratio}: too small for what may be chosen; the smallest "
            f"possible is {ceil(needed * 1e4) / 1e4}"
            if least < inf
            else f"--uniform: no single coder keeps to --layer-bytes-ratio {request.layer_bytes_ratio}"
        )
    planned = {layer: PlannedLayer(None, nbytes, nbytes, 0.0) for layer, nbytes in dense.items()}
    for layer, pick, nbytes, error in zip(layers, found.picks, found.nbytes, found.errors, strict=True):
        planned[layer] = PlannedLayer(pick and pick.spec(measured.sizes), nbytes, dense[layer], error)
    label = None if best is None else (_label(best.picks[0]), best.error / len(planned))
    return Planned(planned, label, all(layer.exact for layer in layers.values()))


def _base_plan(reader: CheckpointReader, config: CompressionConfig) -> CompressionTarget:
    """Any valid plan of the layers asked for: it tells sizes, dtype and names, and has checked the source."""
    return make_target(reader, make_config(method="quantize", layers=config.layers, workers=config.workers))


def _measure_layer(
    base: CompressionTarget,
    config: CompressionConfig,
    request: PlannerConfig,
    layer: int,
    coders: tuple[Coder, ...],
    inputs: LayerInputs | None,
    sizes: Sizes,
    dense_bytes: int,
    progress: ProgressListener,
) -> LayerChoices:
    clock = StageClock()
    read = read_layer(base.source, layer, DTYPES[base.fmt.dtype], config.device, progress, clock)
    progress.stage("center", None, layer)
    options = CenterOptions(config.center, config.max_iterations, config.tolerance)
    found = find_center(read.design, options, Work(config.workers, progress, clock))
    sample = Sample(request.measure_experts, request.measure_rows, DTYPES[base.fmt.dtype], config.seed, config.workers)
    candidates = sum(len(coder.centers) for coder in coders)
    progress.stage(f"measuring {candidates} candidates", None, layer)
    measured = measure_layer(read.design, found, sizes.projections, coders, sample, progress.step)
    if inputs is None:
        weights = torch.ones_like(measured.energies) / measured.energies.sum()
    else:
        weights = output_weights(read, sizes.projections, inputs, layer, config.workers)
    hardness = (measured.residuals[max(measured.residuals)] * weights).sum(1)
    groups = expert_groups(hardness, request.expert_groups)
    uniform = {}
    for key in measured.errors:
        nbytes, error, (choice,) = uniform_choice(measured, weights, sizes, *key)
        uniform[key] = nbytes, error, choice
    return LayerChoices(layer_choices(measured, weights, groups, sizes, dense_bytes), uniform, measured.exact)


def _uniforms(
    layers: dict[int, LayerChoices], bounds: dict[int, tuple[float, float]]
) -> Iterator[tuple[int, Allocation]]:
    """Every single coder that keeps to the bounds: its bytes, and itself."""
    for key in next(iter(layers.values())).uniform:
        own = {layer: choices.uniform[key] for layer, choices in layers.items()}
        if all(bounds[layer][0] <= nbytes <= bounds[layer][1] for layer, (nbytes, _, _) in own.items()):
            made = Allocation(*(tuple(column) for column in zip(*own.values(), strict=True)))
            yield sum(made.nbytes), made


def _best_uniform(
    layers: dict[int, LayerChoices], bounds: dict[int, tuple[float, float]], budget: float
) -> Allocation | None:
    fitting = [made for nbytes, made in _uniforms(layers, bounds) if nbytes <= budget]
    return min(fitting, key=lambda made: made.error, default=None)


def _smallest_uniform(layers: dict[int, LayerChoices], bounds: dict[int, tuple[float, float]]) -> float:
    return min((nbytes for nbytes, _ in _uniforms(layers, bounds)), default=inf)


def _label(choice: Choice) -> str:
    center = choice.centers[0]
    return f"{f'center of {center} bits' if center else 'no center'}; {choice.coders[0][0].label}"
