"""transformers' own experts modules: where they are in a model, their activation, and how to fill them."""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress_tools.architectures.experts import ExpertWeights
from compress_tools.errors import CheckpointError
from compress_tools.format.schema import ExpertNames, Projection
from compress_tools.hf.factored_experts import GateFunction


def experts_module(model: PreTrainedModel, names: ExpertNames, layer: int) -> str:
    """Name of a layer's experts in the live model, whose modules are not always called as its checkpoint's tensors.

    Raises:
        CheckpointError: transformers' class of this family has no one module of experts.
    """
    text = names.layers.get(layer, f"layers.{layer}")
    within = re.compile(rf"(?:.*\.)?{re.escape(text)}\.(?:.*\.)?experts")
    found: list[str] = [name for name, _ in model.named_modules() if within.fullmatch(name)]
    if not found:
        raise CheckpointError(
            f"{type(model).__name__} of this transformers has no module `experts` in layer {layer}; serve the "
            "checkpoint with vLLM, or `resmoe restore` it"
        )
    return min(found, key=len)


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """GPT-OSS's order: gate and up alternate in the last dimension, ``[..., I]`` twice to ``[..., 2I]``."""
    return torch.stack([gate, up], dim=-1).flatten(-2)


def gate_function(dense: nn.Module) -> GateFunction:
    """The activation of an experts module, taken from the module itself."""
    if isinstance(dense, nn.ModuleDict):
        act = next(iter(dense.values())).get_submodule("act")
        return lambda before: act(before["up_proj"])
    if not _is_ungated(dense) and hasattr(dense, "_apply_gate"):
        # A method, which nn.Module's own type does not know: clamped or scaled in some families.
        apply_gate = cast("Callable[[Tensor], Tensor]", dense._apply_gate)
        join = interleave if _is_interleaved(dense) else lambda gate, up: torch.cat([gate, up], dim=-1)
        return lambda before: apply_gate(join(before["gate_proj"], before["up_proj"]))
    # A module in most families, a function in some.
    act_fn = cast("Callable[[Tensor], Tensor]", dense.act_fn)
    if _is_ungated(dense):
        return lambda before: act_fn(before["up_proj"])
    return lambda before: act_fn(before["gate_proj"]) * before["up_proj"]


def fill_experts(dense: nn.Module, experts: Sequence[ExpertWeights]) -> nn.Module:
    """Write restored experts into an experts module; returns it."""
    with torch.no_grad():
        for number, weights in enumerate(experts):
            if isinstance(dense, nn.ModuleDict):
                dense.get_parameter(f"expert_{number}.wi.weight").copy_(weights.up)
                dense.get_parameter(f"expert_{number}.wo.weight").copy_(weights.down)
                continue
            if _is_ungated(dense):
                dense.get_parameter("up_proj")[number].copy_(weights.up)
                dense.get_parameter("down_proj")[number].copy_(weights.down)
                continue
            gate_up, down = dense.get_parameter("gate_up_proj")[number], dense.get_parameter("down_proj")[number]
            if _is_interleaved(dense):
                gate_up.copy_(interleave(weights.matrix("gate_proj").T, weights.up.T))
                down.copy_(weights.down.T)
                gate_up_bias = interleave(weights.biases["gate_proj"], weights.biases["up_proj"])
                dense.get_parameter("gate_up_proj_bias")[number].copy_(gate_up_bias)
                dense.get_parameter("down_proj_bias")[number].copy_(weights.biases["down_proj"])
            elif takes_rows(dense):
                gate_up.copy_(torch.cat([weights.matrix("gate_proj"), weights.up]).T)
                down.copy_(weights.down.T)
            else:
                gate_up.copy_(torch.cat([weights.matrix("gate_proj"), weights.up]))
                down.copy_(weights.down)
    return dense


def expert_of(dense: nn.Module, number: int) -> ExpertWeights:
    """One expert of an experts module, as views of its parameters; the inverse of ``fill_experts``."""
    if isinstance(dense, nn.ModuleDict):
        wide, narrow = (dense.get_parameter(f"expert_{number}.{name}.weight") for name in ("wi", "wo"))
        return ExpertWeights(None, wide, narrow)
    down: Tensor = dense.get_parameter("down_proj")[number]
    if _is_ungated(dense):
        return ExpertWeights(None, dense.get_parameter("up_proj")[number], down)
    gate_up: Tensor = dense.get_parameter("gate_up_proj")[number]
    if _is_interleaved(dense):
        bias = dense.get_parameter("gate_up_proj_bias")[number]
        biases: dict[Projection, Tensor] = {"gate_proj": bias[::2], "up_proj": bias[1::2]}
        biases["down_proj"] = dense.get_parameter("down_proj_bias")[number]
        return ExpertWeights(gate_up[:, ::2].T, gate_up[:, 1::2].T, down.T, biases)
    if takes_rows(dense):
        gate_up, down = gate_up.T, down.T
    gate, up = gate_up.chunk(2)
    return ExpertWeights(gate, up, down)


def takes_rows(dense: nn.Module) -> bool:
    """Llama-4's module: it takes all tokens once for each expert, router weights on them, and inputs lie first."""
    return list(inspect.signature(type(dense).forward).parameters) == ["self", "hidden_states"]


def _is_ungated(dense: nn.Module) -> bool:
    """Nemotron's module: up and down alone."""
    return not hasattr(dense, "gate_up_proj")


def _is_interleaved(dense: nn.Module) -> bool:
    """GPT-OSS's module: gate and up in alternating columns, with biases."""
    return hasattr(dense, "gate_up_proj_bias")
