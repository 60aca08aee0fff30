"""ResMoE checkpoints in transformers: ``AutoModel....from_pretrained(DIR)``, residuals compressed in memory.

``from_pretrained`` gives the factored mode. ``model.dequantize()``, transformers' own verb, gives the restored
mode: dense experts, no trace of ResMoE. Other weights are loaded by transformers as ever.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightTransform
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress_tools.errors import CheckpointError, FormatError, NumericalError
from compress_tools.format.directory import check_layer_count, read_headers
from compress_tools.format.dtypes import DTYPES
from compress_tools.format.finite import plain_fault
from compress_tools.format.loading_guard import GUARD_KEY
from compress_tools.format.schema import QUANT_METHOD, parse_format
from compress_tools.hf.coded_rest import DecodeRows, with_coded_rest
from compress_tools.hf.dense_experts import experts_module, fill_experts, gate_function, takes_rows
from compress_tools.hf.factored_experts import FactoredExperts
from compress_tools.source.design_matrix import rows_to_expert
from compress_tools.stored.checkpoint import ResMoECheckpoint


class ResMoETransformersConfig(QuantizationConfigMixin):
    """The ``quantization_config`` block, as transformers wants to hold it."""

    def __init__(self, **block: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.block = {"quant_method": QUANT_METHOD, **block}
        parse_format(self.block)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *, return_unused_kwargs: bool = False, **_: Any) -> Any:
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
        """Take the guard of config.json away, before transformers takes it for a file to load.

        Raises:
            CheckpointError: config.json counts more layers than there can be; the model is not built yet.
        """
        path = Path(config.name_or_path)
        if path.is_dir():
            check_layer_count(config, read_headers(path), str(path))
        if hasattr(config, GUARD_KEY):
            delattr(config, GUARD_KEY)
        return super().update_tp_plan(config)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remember the dtype that ``from_pretrained`` was asked for."""
        self._asked_dtype = dtype
        return dtype

    def update_weight_conversions(self, weight_conversions: list[WeightTransform]) -> list[WeightTransform]:
        """Decode matrices that are in codes while they are loaded."""
        fmt = self._checkpoint.fmt
        if fmt.rest is None:
            return weight_conversions
        self._decode = DecodeRows(DTYPES[fmt.dtype], self._asked_dtype)
        return with_coded_rest(weight_conversions, fmt.rest.tensors, self._decode)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        """Take the dense experts out, so that no memory is spent on them."""
        if not checkpoint_files:
            raise CheckpointError(
                f"{model.name_or_path or type(model).__name__}: found no weight files; a ResMoE model is loaded from "
                f"its directory, whose index names them"
            )
        self._checkpoint = ResMoECheckpoint(Path(checkpoint_files[0]).parent)
        self._dense: dict[str, nn.Module] = {}
        # transformers' classes have no multi-token prediction.
        for layer in self._checkpoint.fmt.decoder_layers:
            name = experts_module(model, self._checkpoint.fmt.names, layer)
            self._dense[name] = dense = model.get_submodule(name)
            if isinstance(dense, nn.ModuleDict):
                # Switch initialises its experts by name while loading: they stay until the factored ones come.
                model._keys_to_ignore_on_load_missing = {
                    *(model._keys_to_ignore_on_load_missing or ()),
                    r"\.experts\.",
                }
            else:
                model.set_submodule(name, _placeholder(dense))
        # transformers compares no shapes where a model is quantised, and takes what is in the file for its own.
        self._expected = _outlines(model)
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            r"\.resmoe_\w+$",
        }
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Put the factored experts in."""
        checkpoint, fmt = self._checkpoint, self._checkpoint.fmt
        if fmt.rest is not None and self._decode.faults:
            raise FormatError(f"{checkpoint.reader.path}: {self._decode.faults[0]}")
        if fmt.rest is not None and self._decode.decoded < len(fmt.rest.tensors):
            raise CheckpointError(
                f"{checkpoint.reader.path}: {len(fmt.rest.tensors) - self._decode.decoded} of {len(fmt.rest.tensors)} "
                "matrices in 8-bit codes have no place in transformers' class of this model; `resmoe restore` it first"
            )
        for name, found in _outlines(model).items():
            if found != self._expected.get(name, found):
                raise FormatError(
                    f"{checkpoint.reader.path}: {name!r} holds {found}, expected {self._expected[name]} as "
                    f"{type(model).__name__} has by config.json"
                )
        computed = {name for name, _ in model.named_buffers()} - set(model.state_dict())
        for name, parameter in (*model.named_parameters(), *model.named_buffers()):
            if fault := plain_fault(parameter):
                what = f"config.json: {name!r}, computed from it," if name in computed else repr(name)
                raise NumericalError(f"{checkpoint.reader.path}: {what} {fault}")
        # transformers leaves what it renames (Mixtral's router) in the stored dtype where a model is quantised.
        for parameter in model.parameters():
            if parameter.dtype == DTYPES[fmt.dtype] != self._asked_dtype:
                parameter.data = parameter.data.to(self._asked_dtype)
        for layer, name in zip(fmt.decoder_layers, self._dense, strict=True):
            whole = checkpoint.with_layer(layer)
            experts = FactoredExperts(
                fmt.layers[layer],
                fmt.hidden_size,
                fmt.intermediate_size,
                whole.shared(layer),
                [whole.stored(layer, expert) for expert in range(fmt.num_experts)],
                gate_function(self._dense[name]),
                model.dtype,
            ).to(model.device)
            model.set_submodule(name, _as_called(experts, self._dense[name]))
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Dense experts again, restored; the whole model in ``dtype``, if one is given."""
        for name, dense in self._dense.items():
            module = model.get_submodule(name)
            factored = module.experts if isinstance(module, _OneHotRouting | _RowsByExpert | _IdleExperts) else module
            if not isinstance(factored, FactoredExperts):
                raise CheckpointError(f"dequantize: {name} is a {type(factored).__name__}; expected FactoredExperts")
            experts = [
                rows_to_expert(
                    {p: rows.to(model.dtype) for p, rows in factored.restored(expert).items()},
                    factored.biases(expert),
                )
                for expert in range(factored.num_experts)
            ]
            model.set_submodule(name, fill_experts(dense.to_empty(device=model.device).to(model.dtype), experts))
        return model if dtype in (None, model.dtype) else model.to(dtype)

    def is_serializable(self) -> bool:
        """Saving from transformers is not supported: ``resmoe`` writes checkpoints."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Inference only."""
        return False


@dataclass(frozen=True)
class _Outline:
    """What a model's tensor must be like, whatever its precision."""

    shape: tuple[int, ...]
    floating: bool

    def __str__(self) -> str:
        return f"{list(self.shape)} of {'floating-point' if self.floating else 'whole'} numbers"


def _outlines(model: PreTrainedModel) -> dict[str, _Outline]:
    """Of all parameters and persistent buffers."""
    return {
        name: _Outline(tuple(tensor.shape), tensor.is_floating_point()) for name, tensor in model.state_dict().items()
    }


def _placeholder(dense: nn.Module) -> nn.Module:
    """A module without weights: empty tensors stand for those that a family's class initialises by name."""
    empty = nn.Identity()
    for name, _ in dense.named_parameters(recurse=False):
        setattr(empty, name, torch.empty(0))
    return empty


def _as_called(experts: FactoredExperts, dense: nn.Module) -> nn.Module:
    """Factored experts behind the call that a family's model makes of its own module."""
    if isinstance(dense, nn.ModuleDict):
        return _OneHotRouting(experts)
    if takes_rows(dense):
        return _RowsByExpert(experts)
    return _IdleExperts(experts) if hasattr(dense, "identity_expert") else experts


class _IdleExperts(nn.Module):
    """LongCat-Flash: experts from E on have no weights and pass their input on."""

    def __init__(self, experts: FactoredExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """See ``FactoredExperts``."""
        idle = topk_weights.masked_fill(topk_ids < self.experts.num_experts, 0).sum(dim=-1, keepdim=True)
        output: Tensor = self.experts(hidden_states, topk_ids, topk_weights)
        return output + (hidden_states * idle).to(output.dtype)


class _OneHotRouting(nn.Module):
    """Switch routing in front of ``FactoredExperts``: a one-hot expert mask and one weight for each token."""

    def __init__(self, experts: FactoredExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
        """``[T, H]``, ``[T, 1, E]`` (all zero beyond an expert's capacity), ``[T, 1]`` to ``[T, H]``."""
        weight, ids = selected_experts.squeeze(1).max(dim=-1, keepdim=True)
        ids = ids.masked_fill(weight == 0, self.experts.num_experts)
        output: Tensor = self.experts(hidden_states, ids, routing_weights)
        return output


class _RowsByExpert(nn.Module):
    """Llama-4's routing in front of ``FactoredExperts``: all tokens for each expert, zeros where it is not chosen."""

    def __init__(self, experts: FactoredExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[E*T, H]``, router weights on them, to ``[E*T, H]``."""
        count = self.experts.num_experts
        ids = torch.arange(count, device=hidden_states.device).repeat_interleave(len(hidden_states) // count)
        # An expert without biases makes nothing of zeros.
        ids = ids.masked_fill((hidden_states == 0).all(-1), count)[:, None]
        output: Tensor = self.experts(hidden_states, ids, torch.ones_like(ids, dtype=hidden_states.dtype))
        return output


def register() -> None:
    """Make transformers know ``quant_method: resmoe``. Repeatable."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(ResMoEQuantizer)
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(ResMoETransformersConfig)
