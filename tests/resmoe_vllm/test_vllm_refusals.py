"""What vLLM is told instead of a wrong answer: one sentence each."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization import get_quantization_config

import resmoe_vllm
from compress_tools.errors import ConfigError, FormatError, KernelUnsupportedError
from resmoe_vllm import ops
from resmoe_vllm.config import ResMoEConfig
from resmoe_vllm.fused_moe import ResMoEFusedMoEMethod
from resmoe_vllm.kernels.activation import ACTIVATIONS, Activation
from resmoe_vllm.version import version_complaint
from tests.resmoe_vllm.layers import layer_kinds, store_layer
from tests.resmoe_vllm.twins import GATE

FMT = store_layer(layer_kinds(8, 16)["low_rank-joint"], 2, 8, 16, "float32").fmt


@dataclasses.dataclass
class Parallel:
    """The part of FusedMoEParallelConfig that is asked."""

    enable_eplb: bool = False
    use_all2all_kernels: bool = False
    all2all_backend: str = "allgather_reducescatter"


@dataclasses.dataclass
class Moe:
    """The part of FusedMoEConfig that is asked; agrees with ``FMT``."""

    num_experts: int = 2
    hidden_dim: int = 16
    intermediate_size: int = 8
    activation: MoEActivation = MoEActivation.SILU
    is_act_and_mul: bool = True
    has_bias: bool = False
    is_lora_enabled: bool = False
    tp_size: int = 1
    tp_rank: int = 0
    moe_parallel_config: Parallel = dataclasses.field(default_factory=Parallel)


def create(moe: Moe, dtype: torch.dtype = torch.float32, **layer_fields: Any) -> ResMoEFusedMoEMethod:
    """The method of a layer, as vLLM makes it."""
    method = ResMoEFusedMoEMethod(moe, FMT, 0)
    defaults = {
        "apply_router_weight_on_input": False,
        "swiglu_limit": None,
        "swiglu_alpha": None,
        "swiglu_beta": None,
        "_map_global_expert_id_to_local_expert_id": lambda expert: expert,
        "register_parameter": lambda name, param: None,
    }
    layer = SimpleNamespace(**defaults | layer_fields)
    method.create_weights(layer, 2, moe.hidden_dim, moe.intermediate_size, dtype, weight_loader=None)
    return method


def test_what_agrees_is_served() -> None:
    method = create(Moe())
    assert tuple(method.loader.groups[0].params) == (
        "w13_resmoe_center",
        "w2_resmoe_center",
        "w13_resmoe_u",
        "w13_resmoe_v",
        "w2_resmoe_v",
    )


@pytest.mark.parametrize(
    "moe, message",
    [
        (Moe(is_lora_enabled=True), "LoRA on MoE layers"),
        (Moe(moe_parallel_config=Parallel(enable_eplb=True)), "EPLB"),
        (
            Moe(moe_parallel_config=Parallel(use_all2all_kernels=True, all2all_backend="deepep_low_latency")),
            "all2all backend 'deepep_low_latency'",
        ),
    ],
    ids=["lora", "eplb", "all2all"],
)
def test_unsupported_options_are_refused(moe: Moe, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^layer 0: resmoe .*{message}"):
        create(moe)


@pytest.mark.parametrize("name", ["sharded_state", "runai_streamer_sharded", "tensorizer"])
def test_formats_that_call_no_loader_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Else it is said that tensors are missing, though none is."""
    engine = SimpleNamespace(load_config=SimpleNamespace(load_format=name))
    monkeypatch.setattr("resmoe_vllm.compat.get_current_vllm_config_or_none", lambda: engine)
    with pytest.raises(ConfigError, match=f"^layer 0: resmoe doesn't support --load-format {name}, .*start vLLM with"):
        create(Moe())


def test_router_weights_on_the_input_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^layer 0: resmoe .*router weights on the input .* to 2 experts"):
        create(Moe(), apply_router_weight_on_input=True, top_k=2)


def test_shared_experts_among_the_routed_ones_are_refused() -> None:
    """Their ids are behind those that the checkpoint has."""
    with pytest.raises(ConfigError, match=r"^layer 0: resmoe .*shared experts .*AITER_FUSION_SHARED_EXPERTS=0$"):
        create(Moe(), expert_map_manager=SimpleNamespace(num_fused_shared_experts=1))


def test_a_clamped_activation_is_the_layers() -> None:
    method = create(Moe(), swiglu_limit=10.0)
    assert method.activation == Activation("silu", limit=10.0)
    method = create(
        Moe(activation=MoEActivation.SWIGLUOAI_UNINTERLEAVE), swiglu_limit=7.0, swiglu_alpha=1.702, swiglu_beta=1.0
    )
    assert method.activation == ACTIVATIONS["swigluoai"]


@pytest.mark.parametrize(
    "moe, message",
    [
        (Moe(num_experts=3), "num_experts 2, the model has 3"),
        (Moe(hidden_dim=17), "hidden_size 16, the model has 17"),
        (Moe(intermediate_size=16), "intermediate_size 8, the model has 16"),
    ],
    ids=["experts", "hidden", "intermediate"],
)
def test_other_sizes_are_refused(moe: Moe, message: str) -> None:
    with pytest.raises(FormatError, match=f"^layer 0: quantization_config says {message}$"):
        create(moe)


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(KernelUnsupportedError, match="no activation 'situ'; it has: gelu, gelu_no_mul, gelu_tanh"):
        create(Moe(activation=MoEActivation.SITU))
    with pytest.raises(KernelUnsupportedError, match=r"no swiglu_limit 7\.0 of activation 'gelu'"):
        create(Moe(activation=MoEActivation.GELU), swiglu_limit=7.0)


def test_no_kernel_is_an_error_when_weights_are_created(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmoe_vllm.fused_moe.platform_device", lambda: "xpu")
    with pytest.raises(KernelUnsupportedError, match=r"no kernel in bfloat16 on xpu; it has: .* on cpu and cuda"):
        create(Moe(), dtype=torch.bfloat16)
    with pytest.raises(KernelUnsupportedError, match="no kernel in float64 on cpu"):
        ops.check_kernel(frozenset({"low_rank"}), torch.float64, "cpu")
    with pytest.raises(KernelUnsupportedError, match=r"no kernel for magic; it has: bitmap, .*quantized_center"):
        ops.check_kernel(frozenset({"low_rank", "magic"}), torch.bfloat16, "cpu")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 4}, "format_version 4 is not readable by this version, which reads 1, 2 and 3"),
        ({"format_version": None}, "format_version None is not readable"),
        ({"bits": 4}, "quantization_config: bits: Extra inputs are not permitted"),
        ({"dtype": "int8"}, "quantization_config: dtype"),
        ({"quant_method": "awq"}, "quant_method is 'awq', expected 'resmoe'"),
    ],
    ids=["version", "no_version", "unknown_key", "dtype", "method"],
)
def test_a_block_that_is_not_version_1_is_refused(change: dict, message: str) -> None:
    config = get_quantization_config("resmoe")
    assert config is ResMoEConfig
    with pytest.raises(FormatError, match=message):
        config.from_config(FMT.model_dump(mode="json") | change)


def test_biases_that_one_side_alone_has_are_refused() -> None:
    with pytest.raises(FormatError, match=r"^layer 0: experts have biases in quantization_config and no biases in"):
        ResMoEFusedMoEMethod(Moe(), FMT.model_copy(update={"biases": True}), 0)
    with pytest.raises(FormatError, match=r"^layer 0: experts have no biases in quantization_config and biases in"):
        create(Moe(has_bias=True))


def test_a_gate_that_one_side_alone_has_is_refused() -> None:
    names = FMT.names.model_copy(update={"projections": {p: n for p, n in FMT.names.projections.items() if p != GATE}})
    with pytest.raises(FormatError, match=r"^layer 0: experts have no gate in quantization_config and a gate in"):
        ResMoEFusedMoEMethod(Moe(), FMT.model_copy(update={"names": names}), 0)
    with pytest.raises(FormatError, match=r"^layer 0: experts have a gate in quantization_config and no gate in"):
        create(Moe(is_act_and_mul=False))


@pytest.mark.parametrize("version", ["0.30.0", "0.32.0", "0.33.1rc1", "0.32.0+cpu"])
def test_tested_versions(version: str) -> None:
    assert version_complaint(version) is None


@pytest.mark.parametrize("version", ["0.29.1", "0.34.0", "1.0.0", "dev"])
def test_other_versions_are_refused_when_a_checkpoint_is_opened(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    resmoe_vllm.register()
    try:
        with pytest.raises(ConfigError, match=f"^vLLM {version} is outside .* 0.30 <= vllm < 0.34"):
            get_quantization_config("resmoe").from_config({})
    finally:
        monkeypatch.undo()
        resmoe_vllm.register()
    assert get_quantization_config("resmoe") is ResMoEConfig
