"""transformers' own experts modules: where they are in a model, their activation, and how to fill them."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from compress_tools.architectures.base import ExpertWeights, MoEArchitecture
from compress_tools.format.schema import ResMoEFormat
from compress_tools.hf.factored_experts import GateFunction
from compress_tools.source.moe_source import interleave


def experts_module(model: PreTrainedModel, architecture: MoEArchitecture, fmt: ResMoEFormat, layer: int) -> str:
    """Name of a layer's experts in the live model; a bare base model has no ``model.`` in front."""
    template = architecture.fused.experts if architecture.fused else architecture.expert.rsplit(".", 1)[0]
    name = template.replace("{layer}", fmt.names.layers.get(layer, str(layer)))
    return name if hasattr(model, name.split(".")[0]) else name.removeprefix(f"{model.base_model_prefix}.")


def gate_function(dense: nn.Module) -> GateFunction:
    """The activation of an experts module, taken from the module itself."""
    if isinstance(dense, nn.ModuleDict):
        act = next(iter(dense.values())).get_submodule("act")
        return lambda before: act(before["up_proj"])
    if _is_interleaved(dense):
        # A method, which nn.Module's own type does not know.
        apply_gate = cast("nn.Module", dense._apply_gate)
        return lambda before: apply_gate(interleave(before["gate_proj"], before["up_proj"]))
    act = dense.get_submodule("act_fn")
    return lambda before: act(before["gate_proj"]) * before["up_proj"]


def fill_experts(dense: nn.Module, experts: Sequence[ExpertWeights]) -> nn.Module:
    """Write restored experts into an experts module; returns it."""
    with torch.no_grad():
        for number, weights in enumerate(experts):
            if isinstance(dense, nn.ModuleDict):
                dense.get_parameter(f"expert_{number}.wi.weight").copy_(weights.up)
                dense.get_parameter(f"expert_{number}.wo.weight").copy_(weights.down)
                continue
            gate_up, down = dense.get_parameter("gate_up_proj")[number], dense.get_parameter("down_proj")[number]
            if _is_interleaved(dense):
                gate_up.copy_(interleave(weights.matrix("gate_proj").T, weights.up.T))
                down.copy_(weights.down.T)
                gate_up_bias = interleave(weights.biases["gate_proj"], weights.biases["up_proj"])
                dense.get_parameter("gate_up_proj_bias")[number].copy_(gate_up_bias)
                dense.get_parameter("down_proj_bias")[number].copy_(weights.biases["down_proj"])
            else:
                gate_up.copy_(torch.cat([weights.matrix("gate_proj"), weights.up]))
                down.copy_(weights.down)
    return dense


def _is_interleaved(dense: nn.Module) -> bool:
    """GPT-OSS's module: gate and up in alternating columns, with biases."""
    return hasattr(dense, "gate_up_proj_bias")
