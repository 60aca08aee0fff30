"""ResMoE checkpoints in transformers: ``AutoModel....from_pretrained(DIR)``, residuals compressed in memory.

``from_pretrained`` gives the factored mode. ``model.dequantize()``, transformers' own verb, gives the restored
mode: dense experts, no trace of ResMoE. Other weights are loaded by transformers as ever.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress_tools.architectures.base import ExpertWeights, MoEArchitecture
from compress_tools.architectures.registry import find_architecture
from compress_tools.errors import CheckpointError
from compress_tools.format.loading_guard import GUARD_KEY
from compress_tools.format.schema import QUANT_METHOD, parse_format
from compress_tools.format.tensors import DTYPES
from compress_tools.hf.factored_experts import FactoredExperts, GateFunction
from compress_tools.source.design_matrix import rows_to_expert
from compress_tools.source.moe_source import interleave
from compress_tools.stored.checkpoint import ResMoECheckpoint


class ResMoETransformersConfig(QuantizationConfigMixin):
    """The ``quantization_config`` block, as transformers wants to hold it."""

    def __init__(self, **block: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.block = {"quant_method": QUANT_METHOD, **block}
        parse_format(self.block)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **_: Any) -> Any:
        """Build from config.json's block."""
        config = cls(**config_dict)
        return (config, {}) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Back to config.json's block."""
        return dict(self.block)


class ResMoEQuantizer(HfQuantizer):
    """Puts ``FactoredExperts`` in place of each compressed layer's experts."""

    requires_calibration = False

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Take the guard of config.json away, before transformers takes it for a file to load."""
        if hasattr(config, GUARD_KEY):
            delattr(config, GUARD_KEY)
        return super().update_tp_plan(config)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remember the dtype that ``from_pretrained`` was asked for."""
        self._asked_dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        """Take the dense experts out, so that no memory is spent on them."""
        if not checkpoint_files:
            raise CheckpointError("a ResMoE model is loaded from its directory; found no checkpoint files")
        self._checkpoint = ResMoECheckpoint(Path(checkpoint_files[0]).parent)
        self._architecture = find_architecture(self._checkpoint.reader.config)
        self._dense: dict[str, nn.Module] = {}
        for layer in self._checkpoint.fmt.layers:
            name = _experts_module(model, self._architecture, self._checkpoint, layer)
            self._dense[name] = dense = model.get_submodule(name)
            if isinstance(dense, nn.ModuleDict):
                # Switch initialises its experts by name while loading: they stay until the factored ones come.
                model._keys_to_ignore_on_load_missing = {
                    *(model._keys_to_ignore_on_load_missing or ()),
                    r"\.experts\.",
                }
            else:
                model.set_submodule(name, nn.Identity())
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            r"\.resmoe_\w+$",
        }
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Put the factored experts in."""
        checkpoint, fmt = self._checkpoint, self._checkpoint.fmt
        # transformers leaves what it renames (Mixtral's router) in the stored dtype where a model is quantised.
        for parameter in model.parameters():
            if parameter.dtype == DTYPES[fmt.dtype] != self._asked_dtype:
                parameter.data = parameter.data.to(self._asked_dtype)
        for layer, name in zip(fmt.layers, self._dense, strict=True):
            experts = FactoredExperts(
                fmt.layers[layer],
                fmt.hidden_size,
                fmt.intermediate_size,
                checkpoint.shared(layer),
                [checkpoint.stored(layer, expert) for expert in range(fmt.num_experts)],
                gate_function(self._dense[name]),
                model.dtype,
            )
            one_hot = isinstance(self._dense[name], nn.ModuleDict)
            model.set_submodule(name, _OneHotRouting(experts) if one_hot else experts.to(model.device))
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Dense experts again, restored."""
        for name, dense in self._dense.items():
            module = model.get_submodule(name)
            factored = module.experts if isinstance(module, _OneHotRouting) else module
            experts = [
                rows_to_expert(
                    {p: rows.to(model.dtype) for p, rows in factored.restored(expert).items()},
                    factored.biases(expert),
                )
                for expert in range(factored.num_experts)
            ]
            model.set_submodule(name, fill_experts(dense.to_empty(device=model.device).to(model.dtype), experts))
        return model

    def is_serializable(self) -> bool:
        """Saving from transformers is not supported: ``resmoe`` writes checkpoints."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Inference only."""
        return False


class _OneHotRouting(nn.Module):
    """Switch routing in front of ``FactoredExperts``: a one-hot expert mask and one weight for each token."""

    def __init__(self, experts: FactoredExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
        """``[T, H]``, ``[T, 1, E]`` (all zero beyond an expert's capacity), ``[T, 1]`` to ``[T, H]``."""
        weight, ids = selected_experts.squeeze(1).max(dim=-1, keepdim=True)
        ids = ids.masked_fill(weight == 0, self.experts.num_experts)
        return self.experts(hidden_states, ids, routing_weights)


def gate_function(dense: nn.Module) -> GateFunction:
    """The activation of a transformers experts module, taken from the module itself."""
    if isinstance(dense, nn.ModuleDict):
        act = next(iter(dense.values())).act
        return lambda gate, up: act(up)
    if hasattr(dense, "gate_up_proj_bias"):
        return lambda gate, up: dense._apply_gate(interleave(gate, up))
    return lambda gate, up: dense.act_fn(gate) * up


def fill_experts(dense: nn.Module, experts: list[ExpertWeights]) -> nn.Module:
    """Write restored experts into a transformers experts module; returns it."""
    with torch.no_grad():
        for number, weights in enumerate(experts):
            if isinstance(dense, nn.ModuleDict):
                dense[f"expert_{number}"].wi.weight.copy_(weights.up)
                dense[f"expert_{number}"].wo.weight.copy_(weights.down)
            elif hasattr(dense, "gate_up_proj_bias"):
                dense.gate_up_proj[number].copy_(interleave(weights.gate.T, weights.up.T))
                biases = weights.biases
                dense.gate_up_proj_bias[number].copy_(interleave(biases["gate_proj"], biases["up_proj"]))
                dense.down_proj[number].copy_(weights.down.T)
                dense.down_proj_bias[number].copy_(biases["down_proj"])
            else:
                dense.gate_up_proj[number].copy_(torch.cat([weights.gate, weights.up]))
                dense.down_proj[number].copy_(weights.down)
    return dense


def register() -> None:
    """Make transformers know ``quant_method: resmoe``. Repeatable."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(ResMoEQuantizer)
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(ResMoETransformersConfig)


def _experts_module(
    model: PreTrainedModel, architecture: MoEArchitecture, checkpoint: ResMoECheckpoint, layer: int
) -> str:
    """Name of a layer's experts in the live model; a bare base model has no ``model.`` in front."""
    template = architecture.fused.experts if architecture.fused else architecture.expert.rsplit(".", 1)[0]
    name = template.replace("{layer}", checkpoint.fmt.names.layers.get(layer, str(layer)))
    return name if hasattr(model, name.split(".")[0]) else name.removeprefix(f"{model.base_model_prefix}.")
