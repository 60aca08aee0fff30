"""The vLLM names that serving a layer takes, in one place. Paths are those of 0.30 <= vllm < 0.34 (see version.py).

Three files import vLLM themselves, each inside a function: ``__init__.py`` its version alone, version.py what it needs
to refuse a vLLM whose paths these are not, and evaluation.py its public interface (``LLM``, ``EngineArgs``,
``SamplingParams``).
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.forward_context import get_forward_context
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader import weight_utils
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.runai_streamer_loader import RunaiModelStreamerLoader
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

__all__ = [
    "FusedMoEConfig",
    "FusedMoEMethodBase",
    "LinearBase",
    "LinearMethodBase",
    "ParallelLMHead",
    "QuantizationConfig",
    "QuantizeMethodBase",
    "RoutedExperts",
    "UnquantizedEmbeddingMethod",
    "UnquantizedFusedMoEMethod",
    "UnquantizedLinearMethod",
    "VocabParallelEmbedding",
    "WeightsMapper",
    "allow_amx",
    "complete_expert_names",
    "current_quant_config",
    "direct_register_custom_op",
    "embeddings_are_tied",
    "extract_layer_index",
    "is_batch_invariant",
    "is_dummy_load",
    "layer_is_replaced",
    "llama4_decoder",
    "load_format",
    "lora_managers",
    "lora_target_modules",
    "platform_device",
    "quant_method_of",
    "register_quantization_config",
    "surround_loading",
    "watch_weights",
    "weight_only_kernel",
]

REMAP = "maybe_remap_moe_expert_param_name"


def allow_amx() -> None:
    """Ask the kernel for AMX tiles where the CPU has them; vLLM's bf16 attention needs them asked for."""
    if current_platform.is_cpu() and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def complete_expert_names() -> None:
    """Make loaders of single models find ResMoE's parameters as they find those of vLLM's own formats.

    Granite-4's loader asks a helper of vLLM's to put ``routed_experts.`` into an expert tensor's name. The helper does
    so for the suffixes that it lists, and ResMoE's are not among them. A model that was imported before the plugin
    holds the helper by name, so it is replaced there as well.
    """
    known = getattr(weight_utils, REMAP, None)
    if known is None or hasattr(known, "resmoe_wraps"):
        return

    def remap(name: str, params_dict: Mapping[str, torch.nn.Parameter]) -> str:
        completed = name.replace(".experts.", ".experts.routed_experts.", 1)
        if ".experts.routed_experts." not in name and "_resmoe_" in name and completed in params_dict:
            return completed
        return str(known(name, params_dict))

    remap.resmoe_wraps = known  # type: ignore[attr-defined]  # marks it; functions take attributes
    for module in [*sys.modules.values()]:
        # Through __dict__: a lazy module would import what it is asked for.
        if getattr(module, "__dict__", {}).get(REMAP) is known:
            setattr(module, REMAP, remap)


def platform_device() -> str:
    """Device type that vLLM puts weights on: "cpu", "cuda", ..."""
    return str(current_platform.device_type)


def is_batch_invariant() -> bool:
    """Whether a token's bits must not depend on its batch (``VLLM_BATCH_INVARIANT=1``)."""
    return bool(envs.VLLM_BATCH_INVARIANT)


def load_format() -> str:
    """What ``--load-format`` says; ``auto`` where no model is being built."""
    config = get_current_vllm_config_or_none()
    return "auto" if config is None else str(config.load_config.load_format)


def is_dummy_load() -> bool:
    """Whether vLLM loads random weights (``--load-format dummy``) and so calls no weight loader."""
    return load_format() == "dummy"


def current_quant_config() -> QuantizationConfig | None:
    """The quantisation of the model that is being built; None without one, or where none is."""
    config = get_current_vllm_config_or_none()
    return None if config is None else config.quant_config


def embeddings_are_tied() -> bool:
    """Whether config.json of the model that is being built ties output layer and embedding."""
    config = get_current_vllm_config_or_none()
    if config is None or config.model_config is None:
        return False
    whole = config.model_config.hf_config
    return any(getattr(part, "tie_word_embeddings", False) for part in (whole, config.model_config.hf_text_config))


def layer_is_replaced(name: str) -> bool:
    """Whether a plugin has put a class in place of vLLM's layer of this name."""
    return name in op_registry_oot


def weight_only_kernel(full_shape: tuple[int, int], shape: tuple[int, int], dtype: torch.dtype) -> Any | None:
    """VLLM's own kernel for 8-bit weights with one scale for each output; None where it has none that fits.

    Args:
        full_shape: inputs and outputs of the layer.
        shape: the same on this rank.
        dtype: the model's.
    """
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
    from vllm.scalar_type import scalar_types

    config = MPLinearLayerConfig(
        full_weight_shape=full_shape,
        partition_weight_shape=shape,
        weight_type=scalar_types.uint8b128,
        act_type=dtype,
        group_size=-1,
        zero_points=False,
    )
    try:
        kernel = choose_mp_linear_kernel(config)
    except ValueError:
        return None
    return kernel(config, w_q_param_name="weight_packed", w_s_param_name="weight_scale")


def watch_weights(watch: Callable[[Any, Any, Iterable[tuple[str, Tensor]]], Iterator[tuple[str, Tensor]]]) -> None:
    """Let all tensors that a loader of vLLM's reads from a checkpoint pass a generator, under their names on disk.

    No hook of a quantization config sees them: parameters have loaders of their own, and models map names first.

    Args:
        watch: is given the loader, vLLM's config of the model, and the tensors.
    """
    for loader in (DefaultModelLoader, RunaiModelStreamerLoader):
        reads = loader.get_all_weights
        if hasattr(reads, "resmoe_watches"):
            continue

        # Bound now: the loop goes on.
        def get_all_weights(
            self: Any, model_config: Any, model: torch.nn.Module, *, _reads: Any = reads
        ) -> Iterator[tuple[str, Tensor]]:
            return watch(self, model_config, _reads(self, model_config, model))

        get_all_weights.resmoe_watches = reads  # type: ignore[attr-defined]  # marks it; functions take attributes
        setattr(loader, "get_all_weights", get_all_weights)  # noqa: B010  mypy takes no assignment to a method


def surround_loading(surround: Callable[[Any, torch.nn.Module, Any], AbstractContextManager[None]]) -> None:
    """Let vLLM load weights inside of a context, which sees the model before and after it, and errors.

    Args:
        surround: is given the loader, the model, and vLLM's config of it.
    """
    for loader in (DefaultModelLoader, RunaiModelStreamerLoader):
        loads = loader.load_weights
        if hasattr(loads, "resmoe_surrounds"):
            continue

        # Bound now: the loop goes on.
        def load_weights(self: Any, model: torch.nn.Module, model_config: Any, *, _loads: Any = loads) -> None:
            with surround(self, model, model_config):
                _loads(self, model, model_config)

        load_weights.resmoe_surrounds = loads  # type: ignore[attr-defined]  # marks it; functions take attributes
        setattr(loader, "load_weights", load_weights)  # noqa: B010  mypy takes no assignment to a method


def lora_target_modules() -> list[str] | None:
    """What ``--lora-target-modules`` says; None without it."""
    config = get_current_vllm_config_or_none()
    return None if config is None or config.lora_config is None else config.lora_config.target_modules


def lora_managers() -> tuple[Any, type[Any]]:
    """The module that picks a model's modules for LoRA, and the class that loads adapters; imported where needed."""
    from vllm.lora import model_manager
    from vllm.lora.worker_manager import WorkerLoRAManager

    return model_manager, WorkerLoRAManager


def llama4_decoder() -> tuple[type[Any], Any]:
    """Llama-4's decoder, and what makes its mapping of experts that lie one by one; imported where needed."""
    from vllm.model_executor.layers.fused_moe import fused_moe_make_expert_params_mapping
    from vllm.model_executor.models.llama4 import Llama4Model

    return Llama4Model, fused_moe_make_expert_params_mapping


def quant_method_of(layer_name: str) -> Any:
    """The method of a MoE layer of the engine whose forward pass is running, by ``RoutedExperts.layer_name``.

    The forward context names runners (``MoERunner``), which hold the layer.
    """
    return get_forward_context().no_compile_layers[layer_name].routed_experts.quant_method
