"""What a unit of weight error does to a layer's output, to first order.

An error ``dW`` of a projection that has no direction of its own (quantisation's, say) changes an expert's output
``y = down (act(gate x) * (up x))`` by, for each token, on average over directions and for each unit of ``||dW||^2``:

- down: ``||a||^2 / I``, with ``a = act(gate x) * (up x)``;
- up: ``||x||^2 / (I*H) * sum_i ||down_i||^2 act(g_i)^2``;
- gate: ``||x||^2 / (I*H) * sum_i ||down_i||^2 (act'(g_i) u_i)^2``.

So these closed forms are averaged over inputs, and nothing is perturbed. Two-matrix experts have ``a = act(up x)``.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.format.schema import Projection
from compress_tools.importance import LEAST_ROUTING
from compress_tools.numerics.parallel import in_parallel
from compress_tools.planner.config import PlannerConfig
from compress_tools.source.design_matrix import design_to_rows
from compress_tools.source.layer_weights import LayerWeights
from compress_tools.source.moe_source import MoESource

RANDOM_INPUTS = 256

Activation = Callable[[Tensor], Tensor]
_ACTIVATIONS: dict[str, Activation] = {
    "silu": torch.nn.functional.silu,
    "swish": torch.nn.functional.silu,
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "relu2": lambda x: torch.nn.functional.relu(x).square(),
    "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
_ACTIVATION_KEYS = ("hidden_act", "dense_act_fn", "hidden_activation", "mlp_hidden_act")


@dataclass(frozen=True)
class LayerInputs:
    """Where a layer's inputs come from.

    Attributes:
        activation: of the experts.
        hidden_size: H.
        num_experts: E.
        seed: of random inputs.
        calibration: file of inputs; None for standard gaussians, which is what a layer sees after RMS norm.
        drafts: layers for multi-token prediction, which a calibration need not have: it comes from a model without.
    """

    activation: Activation
    hidden_size: int
    num_experts: int
    seed: int
    calibration: Path | None
    drafts: frozenset[int] = frozenset()

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Inputs fp32 ``[N, H]``, and the router weight of each expert fp32 ``[N, E]``, 0 where it is not chosen.

        Raises:
            CheckpointError: not in the file, or not of that shape, or not finite.
        """
        name = f"layer.{layer}"
        if self.calibration is None or (layer in self.drafts and not _holds(self.calibration, name)):
            generator = torch.Generator().manual_seed(self.seed)
            inputs = torch.randn(RANDOM_INPUTS, self.hidden_size, generator=generator)
            return inputs, torch.ones(RANDOM_INPUTS, self.num_experts)
        inputs = _read(self.calibration, name, self.hidden_size)
        if not _holds(self.calibration, f"{name}.routing"):
            return inputs, torch.ones(len(inputs), self.num_experts)
        routing = _read(self.calibration, f"{name}.routing", self.num_experts)
        if len(routing) != len(inputs):
            raise CheckpointError(f"{self.calibration}: {name}.routing has {len(routing)} rows, {name} {len(inputs)}")
        return inputs, routing


def _holds(path: Path, name: str) -> bool:
    with safe_open(path, framework="pt") as file:
        return name in file.keys()  # noqa: SIM118  not a mapping


def _read(path: Path, name: str, columns: int) -> Tensor:
    """A finite matrix of so many columns, fp32."""
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name).float()
    except (SafetensorError, OSError) as err:
        raise CheckpointError(f"{path}: can't read {name!r}: {err}") from err
    if tensor.ndim != 2 or tensor.shape[1] != columns or not len(tensor):
        raise CheckpointError(f"{path}: {name!r} has shape {list(tensor.shape)}, expected [N, {columns}]")
    if not tensor.isfinite().all():
        raise CheckpointError(f"{path}: {name!r} is not finite")
    return tensor


def open_inputs(request: PlannerConfig, source: MoESource, seed: int) -> LayerInputs | None:
    """Where inputs come from; None where the objective needs none.

    Raises:
        ConfigError: the family's activation is not known here.
        CheckpointError: the calibration file is not there.
    """
    if request.optimize != "output":
        return None
    config = source.reader.config
    name = next((config[key] for key in _ACTIVATION_KEYS if key in config), None)
    if name not in _ACTIVATIONS or source.architecture.biased:
        raise ConfigError(
            f"--optimize output: the experts of {source.architecture.title} have biases or an activation ({name!r}) "
            f"that is not among {', '.join(_ACTIVATIONS)}; use --optimize error"
        )
    path = None if request.calibration is None else Path(request.calibration)
    if path is not None and not path.is_file():
        raise CheckpointError(f"{path}: no such file; --calibration takes a safetensors file")
    sizes = source.sizes
    return LayerInputs(_ACTIVATIONS[name], sizes.hidden_size, sizes.num_experts, seed, path, frozenset(source.drafts))


class OutputWeights(NamedTuple):
    """What errors of a layer count.

    Attributes:
        weights: of a unit of squared error, float64 ``[E, P]``, all above 0 where an expert has any effect.
        unrouted: experts that count by ``LEAST_ROUTING``, since the calibration routes less to them.
    """

    weights: Tensor
    unrouted: tuple[int, ...]


def unrouted_text(experts: Collection[int]) -> str:
    """For the log and the plan."""
    return (
        f"the calibration routes next to nothing to experts {', '.join(map(str, experts))}; each counts as if its "
        f"squared router weight were {LEAST_ROUTING:.0%} of the mean expert's"
    )


def output_weights(
    read: LayerWeights, projections: tuple[Projection, ...], inputs: LayerInputs, layer: int, workers: int = 1
) -> OutputWeights:
    """What a unit of squared error counts.

    ``sum_e,p weight * error`` estimates ``sum ||dy||^2 / sum ||y||^2`` of the layer's expert outputs, each weighed by
    its router weight (at least ``LEAST_ROUTING``); sums over tokens and experts.

    Args:
        read: the layer's experts.
        projections: P, in design-matrix order.
        inputs: where inputs come from.
        layer: decoder layer index.
        workers: experts side by side.
    Raises:
        CheckpointError: the calibration file has no such inputs; or all outputs are zero under them.
    """
    tokens, routing = inputs.of(layer)
    squares = routing.double().square()  # [N, E]
    used = squares.mean(0)  # [E]
    lacking = (LEAST_ROUTING * used.mean() - used).clamp(min=0)
    squares = squares + lacking  # spread over all tokens

    def of_expert(expert: int) -> list[float]:
        rows = {p: own.float() for p, own in design_to_rows(read.design[expert].cpu(), projections).items()}
        effects, energy = expert_effects(rows, tokens, inputs.activation)
        own = squares[:, expert]
        return [float((effects[p].double() * own).sum()) for p in projections] + [float((energy.double() * own).sum())]

    sums = torch.tensor(in_parallel(of_expert, range(len(read.design)), workers), dtype=torch.float64)
    energy = sums[:, -1].sum()
    if not energy > 0:
        raise CheckpointError(f"{inputs.calibration or 'weights'}: layer {layer}: the experts' outputs are all zero")
    return OutputWeights(sums[:, :-1] / energy, tuple(lacking.nonzero().flatten().tolist()))


def expert_effects(
    rows: dict[Projection, Tensor], tokens: Tensor, activation: Activation
) -> tuple[dict[Projection, Tensor], Tensor]:
    """Mean ``||dy||^2`` for each unit of ``||dW||^2``, by projection; and ``||y||^2``. All fp32 ``[N]``.

    Args:
        rows: one expert's matrices ``[I, H]``, ``down_proj`` transposed.
        tokens: inputs ``[N, H]``.
        activation: of the expert.
    """
    up, down = rows["up_proj"], rows["down_proj"]
    size_i, size_h = up.shape
    lift = tokens @ up.T  # [N, I]
    gated = tokens @ rows["gate_proj"].T if "gate_proj" in rows else lift
    active, slope = _with_slope(activation, gated)
    inner = active * lift if "gate_proj" in rows else active
    reach = down.square().sum(1)  # [I]
    scale = tokens.square().sum(1) / (size_i * size_h)  # [N]
    effects: dict[Projection, Tensor] = {"down_proj": inner.square().sum(1) / size_i}
    if "gate_proj" in rows:
        effects["up_proj"] = scale * (active.square() @ reach)
        effects["gate_proj"] = scale * ((slope * lift).square() @ reach)
    else:
        effects["up_proj"] = scale * (slope.square() @ reach)
    return effects, (inner @ down).square().sum(1)


def _with_slope(activation: Activation, values: Tensor) -> tuple[Tensor, Tensor]:
    """The activation and its derivative."""
    with torch.enable_grad():
        leaf = values.detach().requires_grad_()
        active = activation(leaf)
        (slope,) = torch.autograd.grad(active.sum(), leaf)
    return active.detach(), slope
