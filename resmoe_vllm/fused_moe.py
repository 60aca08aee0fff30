"""The fused MoE method of a compressed layer: parameters, loading, forward, and refusals by name."""

import torch
from torch import Tensor
from typing_extensions import override

from compress_tools.errors import ConfigError, FormatError
from compress_tools.format.schema import ResMoEFormat
from compress_tools.format.tensors import dense_layer_bytes
from resmoe_vllm import llama4, ops
from resmoe_vllm.compat import (
    FusedMoEConfig,
    FusedMoEMethodBase,
    RoutedExperts,
    is_dummy_load,
    load_format,
    platform_device,
)
from resmoe_vllm.gpt_oss import add_places, remove_places, streams_experts
from resmoe_vllm.kernels.activation import make_activation
from resmoe_vllm.start_log import LoadedLayer, StartLog, held_bytes
from resmoe_vllm.weights.layer_loader import LayerLoader

# Of --load-format: they fill the parameters of a model that was saved after loading, and call no weight loader.
SAVED_PARAMETERS = frozenset({"sharded_state", "runai_streamer_sharded", "tensorizer"})


class ResMoEFusedMoEMethod(FusedMoEMethodBase):
    """Serves one compressed MoE layer.

    vLLM's runner routes before ``apply`` and scales, adds shared experts and all-reduces after it.

    Args:
        moe: vLLM's description of the layer.
        fmt: the checkpoint's format block.
        index: decoder layer index.
        start_log: told of the layer once it is bound; the model's, so that all its layers are told at once.
    Raises:
        ConfigError: vLLM is asked for something that compressed experts can't do.
        FormatError: the model's experts are not the checkpoint's.
    """

    def __init__(self, moe: FusedMoEConfig, fmt: ResMoEFormat, index: int, start_log: StartLog | None = None) -> None:
        super().__init__(moe)
        self._start_log = start_log or StartLog(fmt.format_version)
        self.fmt = fmt
        self.index = index
        refuse_unsupported(moe, fmt, index)

    @override
    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Register the layer's parameters.

        Args:
            layer: owner of the parameters.
            num_experts: experts on this rank; the loader asks vLLM which.
            hidden_size: H.
            intermediate_size_per_partition: I of this rank.
            params_dtype: the model's dtype; weights are held in it.
            extra_weight_attrs: vLLM's weight loader and others, not used.
        Raises:
            ConfigError: router weights on the input of more than one expert, or shared experts among the routed ones.
            KernelUnsupportedError: no kernel for coders, dtype and device, or for the activation.
        """
        where = f"layer {self.index}"
        # not every version that is served has it
        manager = getattr(layer, "expert_map_manager", None)
        if getattr(manager, "num_fused_shared_experts", 0):
            raise ConfigError(
                f"{where}: resmoe doesn't support shared experts that are served as routed ones; start vLLM with "
                f"VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=0"
            )
        if layer.apply_router_weight_on_input:
            if layer.top_k != 1:
                raise ConfigError(
                    f"{where}: resmoe doesn't support models that apply router weights on the input and route each "
                    f"token to {layer.top_k} experts; neither does vLLM"
                )
            llama4.load_by_name()
        self.activation = make_activation(
            self.moe.activation.value, layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta
        )
        loader = LayerLoader(
            self.fmt,
            self.index,
            layer._map_global_expert_id_to_local_expert_id,
            tp_size=self.moe.tp_size,
            tp_rank=self.moe.tp_rank,
            padded=platform_device() != "cpu",
        )
        for group in loader.groups:
            ops.check_kernel(group.layout.coders, params_dtype, platform_device())
        loader.create_params(layer, params_dtype)
        if streams_experts(layer):
            add_places(layer, loader)
        self.loader, self.dummy = loader, is_dummy_load()
        self._dtype = params_dtype
        dtype = str(params_dtype).removeprefix("torch.")
        self._shape = f"I {intermediate_size_per_partition}, H {hidden_size} in {dtype}"
        self._start_log.expect(self.index)

    @override
    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check that every tensor came, then bind the weights to their kernels.

        Raises:
            FormatError: tensors are missing.
        """
        if self.loader.finished:
            return
        remove_places(layer)
        if self.dummy:
            self.loader.load_dummies()
        self.loader.check_complete()
        self.loader.finished = True
        self.bound = ops.BoundLayer(self.loader.bind(layer), self.activation, platform_device())
        device = next(layer.parameters()).device
        self.bound.warm_up(layer.top_k, self._dtype, device, layer.expert_map)
        self._start_log.add(self.index, self._loaded(layer), ops.describe_kernel(platform_device()))

    def _loaded(self, layer: RoutedExperts) -> LoadedLayer:
        experts = sum(len(group.rows) for group in self.loader.groups)
        dense = dense_layer_bytes(self.fmt, self._dtype.itemsize) * experts
        dense //= self.fmt.num_experts * self.moe.tp_size
        return LoadedLayer(self.fmt.layers[self.index].describe(), self._shape, experts, held_bytes(layer), dense)

    @override
    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """None: only vLLM's own kernels use one."""
        return

    @override
    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: object = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """This rank's partial sum over the routed experts.

        Args:
            layer: owner of the parameters.
            x: hidden states ``[T, H]``.
            topk_weights: fp32 ``[T, K]``.
            topk_ids: global expert ids ``[T, K]``; -1 is skipped.
            shared_experts: run by the runner, not used.
            shared_experts_input: not used.
        Returns:
            ``[T, H]``, x's dtype, fresh.
        """
        if layer.apply_router_weight_on_input:
            # in x's dtype, as vLLM's own kernels do; K is 1
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        out: Tensor = torch.ops.resmoe.fused_moe(x, topk_weights, topk_ids, layer.expert_map, layer.layer_name)
        return out


def refuse_unsupported(moe: FusedMoEConfig, fmt: ResMoEFormat, index: int) -> None:
    """Refuse, by name, what compressed experts can't do and sizes that aren't the checkpoint's.

    Raises:
        ConfigError: a vLLM option.
        FormatError: sizes, biases or gate.
    """
    where = f"layer {index}"
    parallel = moe.moe_parallel_config
    if (loads := load_format()) in SAVED_PARAMETERS:
        raise ConfigError(
            f"{where}: resmoe doesn't support --load-format {loads}, which doesn't read tensors as they lie in a "
            f"checkpoint; start vLLM without --load-format"
        )
    if moe.is_lora_enabled:
        raise ConfigError(f"{where}: resmoe doesn't support LoRA on MoE layers; start vLLM without --enable-lora")
    if parallel.enable_eplb:
        raise ConfigError(f"{where}: resmoe doesn't support EPLB; start vLLM without --enable-eplb")
    if parallel.use_all2all_kernels and parallel.all2all_backend != "allgather_reducescatter":
        raise ConfigError(
            f"{where}: resmoe doesn't support all2all backend {parallel.all2all_backend!r}; "
            f"start vLLM with --all2all-backend allgather_reducescatter"
        )
    kinds = {
        ("biases", "no biases"): (fmt.biases, moe.has_bias),
        ("a gate", "no gate"): (fmt.gated, moe.is_act_and_mul),
    }
    for (some, none), (stored, wanted) in kinds.items():
        if stored != wanted:
            raise FormatError(
                f"{where}: experts have {some if stored else none} in quantization_config and "
                f"{some if wanted else none} in the model"
            )
    sizes = {
        "num_experts": (fmt.num_experts, moe.num_experts),
        "hidden_size": (fmt.hidden_size, moe.hidden_dim),
        "intermediate_size": (fmt.intermediate_size, moe.intermediate_size),
    }
    for name, (expected, found) in sizes.items():
        if expected != found:
            raise FormatError(f"{where}: quantization_config says {name} {expected}, the model has {found}")
