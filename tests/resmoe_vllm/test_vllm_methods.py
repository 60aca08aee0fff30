"""Which method serves which layer, every option that is refused, and what the method does with its weights."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress_tools.errors import ConfigError, FormatError, KernelUnsupportedError
from compress_tools.format.schema import parse_format
from resmoe_vllm import config as config_module
from resmoe_vllm import fused_moe
from resmoe_vllm.config import ResMoEConfig, layer_index
from resmoe_vllm.fused_moe import ResMoEFusedMoEMethod
from tests.resmoe_vllm.kernels.test_vllm_kernels import forward_pass
from tests.resmoe_vllm.layers import grouped_layer, hand_over, layer_kinds, store_layer
from tests.resmoe_vllm.test_vllm_refusals import FMT, Moe, Parallel, create

SIZE_E, SIZE_I, SIZE_H = 4, 9, 20


class Layer(torch.nn.Module):
    """The part of vLLM's RoutedExperts that is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.apply_router_weight_on_input = False
        self.swiglu_limit = self.swiglu_alpha = self.swiglu_beta = None
        self.expert_map = None
        self.layer_name = "layer"
        self.top_k = 2

    @staticmethod
    def _map_global_expert_id_to_local_expert_id(expert: int) -> int:
        return expert


@pytest.mark.parametrize("name", ["limit", "alpha", "beta"])
def test_every_scale_of_swiglu_is_the_layers(name: str) -> None:
    plain, scaled = create(Moe()).activation, create(Moe(), **{f"swiglu_{name}": 7.0}).activation
    assert scaled == replace(plain, **{name: 7.0}) != plain


def test_a_limit_of_zero_is_refused() -> None:
    with pytest.raises(KernelUnsupportedError, match=r"resmoe has no swiglu_limit 0\.0; expected a number above 0"):
        create(Moe(), swiglu_limit=0.0)


@pytest.mark.parametrize(
    "parallel",
    [
        Parallel(use_all2all_kernels=True),
        Parallel(use_all2all_kernels=False, all2all_backend="deepep_low_latency"),
    ],
    ids=["the plain backend", "no kernels at all"],
)
def test_what_needs_no_kernels_of_its_own_is_served(parallel: Parallel) -> None:
    assert len(create(Moe(moe_parallel_config=parallel)).loader.groups) == 1


class _Routed:
    moe_config = Moe()


class _Linear:
    pass


class _Embedding:
    pass


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> ResMoEConfig:
    """A config that tells small stand-ins of vLLM's layers apart."""
    for name, kind in (("RoutedExperts", _Routed), ("LinearBase", _Linear), ("VocabParallelEmbedding", _Embedding)):
        monkeypatch.setattr(config_module, name, kind)
    for name in ("UnquantizedFusedMoEMethod", "PlainLinearMethod", "PlainEmbeddingMethod"):
        monkeypatch.setattr(config_module, name, lambda argument, name=name: (name, argument))
    return ResMoEConfig(FMT)


def test_each_layer_has_its_method(methods: ResMoEConfig) -> None:
    assert list(FMT.layers) == [0]
    served = methods.get_quant_method(_Routed(), "model.layers.0.mlp.experts")
    assert isinstance(served, ResMoEFusedMoEMethod)
    assert (served.fmt, served.index) == (FMT, 0)
    # a layer that is not compressed
    assert methods.get_quant_method(_Routed(), "model.layers.1.mlp.experts")[0] == "UnquantizedFusedMoEMethod"
    assert methods.get_quant_method(_Linear(), "model.layers.0.q") == ("PlainLinearMethod", "model.layers.0.q")
    assert methods.get_quant_method(_Embedding(), "embed") == ("PlainEmbeddingMethod", "embed")
    assert methods.get_quant_method(object(), "model.norm") is None


DRAFTS = parse_format(
    {
        **FMT.model_dump(mode="json"),
        "format_version": 3,
        "names": {**FMT.names.model_dump(), "drafts": {"2": "mtp.layers.0.mlp.experts.{expert}"}},
        "layers": dict.fromkeys(("0", "2"), FMT.layers[0].model_dump(mode="json")),
    }
)


@pytest.mark.parametrize(
    ("prefix", "plain", "with_drafts"),
    [
        ("model.layers.0.mlp.experts", 0, 0),
        ("language_model.model.layers.0.feed_forward.experts", 0, 0),
        ("model.layers.1.mlp.experts", None, None),
        # a draft's own number is no decoder layer's
        ("mtp.layers.0.mlp.experts", None, 2),
        ("model.mtp.layers.0.mlp.experts", None, 2),
        ("mtp.layers.1.mlp.experts", None, None),
        # behind the decoder
        ("model.layers.2.mlp.experts", None, 2),
    ],
)
def test_drafts_are_told_by_their_prefix(prefix: str, plain: int | None, with_drafts: int | None) -> None:
    assert (layer_index(prefix, FMT), layer_index(prefix, DRAFTS)) == (plain, with_drafts)


def test_a_draft_needs_no_output_layer_of_its_own(methods: ResMoEConfig) -> None:
    own = [methods.get_quant_method(_Embedding(), prefix) for prefix in ("lm_head", "model.embed_tokens")]
    assert [name for name, _ in own] == ["PlainEmbeddingMethod"] * 2
    for prefix in ("model.layers.2.shared_head.head", "model.layers.2.head", "mtp.embed_tokens", ""):
        assert isinstance(methods.get_quant_method(_Embedding(), prefix), config_module.UnquantizedEmbeddingMethod)


def test_what_vllm_is_told_of_the_method() -> None:
    config = ResMoEConfig.from_config(FMT.model_dump(mode="json"))
    assert config.fmt == FMT
    assert config.get_name() == "resmoe"
    assert set(config.get_supported_act_dtypes()) == {torch.float32, torch.bfloat16, torch.float16}
    assert (config.get_min_capability(), config.get_config_filenames()) == (0, [])


def made(kind: str, **moe: Any) -> tuple[ResMoEFusedMoEMethod, Layer, Any]:
    """A method, its layer with parameters, and what is to be loaded."""
    kinds = layer_kinds(SIZE_I, SIZE_H) | {"groups": grouped_layer(SIZE_I, SIZE_H)}
    stored = store_layer(kinds[kind], SIZE_E, SIZE_I, SIZE_H, "float32")
    described = Moe(num_experts=SIZE_E, hidden_dim=SIZE_H, intermediate_size=SIZE_I, **moe)
    method, layer = ResMoEFusedMoEMethod(described, stored.fmt, 0), Layer()
    method.create_weights(layer, SIZE_E, SIZE_H, SIZE_I, torch.float32)
    return method, layer, stored


def load(layer: Layer, stored: Any) -> None:
    for key, tensor in stored.shared.items():
        hand_over(layer, key, 0, tensor)
    for expert, own in enumerate(stored.experts):
        for key, tensor in own.items():
            hand_over(layer, key, expert, tensor)


def dense(stored: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Token by token through restored experts, in fp64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, (own_weights, own_ids) in enumerate(zip(weights, ids, strict=True)):
        for weight, expert in zip(own_weights.tolist(), own_ids.tolist(), strict=True):
            if expert < 0:
                continue
            rows = {projection: matrix.double() for projection, matrix in stored.restored(expert).items()}
            gate, up = rows["gate_proj"] @ x[token].double(), rows["up_proj"] @ x[token].double()
            out[token] += weight * (rows["down_proj"].T @ (torch.nn.functional.silu(gate) * up))
    return out


@pytest.mark.parametrize("kind", ["low_rank-joint", "bitmap-4bit", "groups"])
def test_apply_is_a_loop_over_restored_experts(kind: str) -> None:
    method, layer, stored = made(kind)
    load(layer, stored)
    method.process_weights_after_loading(layer)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, SIZE_H, generator=generator)
    weights = torch.rand(6, 2, generator=generator)
    ids = torch.stack([torch.randperm(SIZE_E, generator=generator)[:2] for _ in range(6)])
    ids[2, 1] = -1
    with forward_pass(layer=method.bound):
        found = method.apply(layer, x, weights, ids)
    torch.testing.assert_close(found.double(), dense(stored, x, weights, ids), rtol=1e-4, atol=1e-5)
    assert method.get_fused_moe_quant_config(layer) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_router_weights_go_on_the_input_where_the_model_says_so(dtype: torch.dtype) -> None:
    method, layer, stored = made("low_rank-joint")
    load(layer, stored)
    method.process_weights_after_loading(layer)
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(6, SIZE_H, generator=generator).to(dtype), torch.rand(6, 1, generator=generator)
    ids = torch.randint(SIZE_E, (6, 1), generator=generator)
    ids[2] = -1
    layer.apply_router_weight_on_input = True
    with forward_pass(layer=method.bound):
        found = method.apply(layer, x, weights, ids)
    # scaled in the dtype of x, the output not at all
    scaled = x * weights.to(dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(found.double(), dense(stored, scaled, torch.ones(6, 1), ids), **tolerance)


def test_incomplete_weights_are_refused_and_complete_ones_let_go() -> None:
    method, layer, stored = made("groups")
    with pytest.raises(FormatError, match=r"layer 0: (\d+) of \1 tensors are missing"):
        method.process_weights_after_loading(layer)
    load(layer, stored)
    method.process_weights_after_loading(layer)
    assert method.loader.finished
    with pytest.raises(ConfigError, match="layer 0: resmoe doesn't support reloading weights in a running engine"):
        load(layer, stored)
    # vLLM may call it again
    method.process_weights_after_loading(layer)


def test_dummy_weights_are_loaded_where_vllm_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_moe, "is_dummy_load", lambda: True)
    method, layer, _ = made("groups")
    method.process_weights_after_loading(layer)
    ids = torch.arange(SIZE_E)[:, None]
    with forward_pass(layer=method.bound):
        out = method.apply(layer, torch.ones(SIZE_E, SIZE_H), torch.ones(SIZE_E, 1), ids)
    assert out.isfinite().all()
    assert (out.abs().amax(1) > 0).all()


def test_ranks_are_those_of_vllm() -> None:
    whole, _, _ = made("low_rank-joint")
    third, layer, _ = made("low_rank-joint", tp_size=3, tp_rank=2)
    assert whole.loader.groups[0].rows_from == 0
    assert third.loader.groups[0].rows_from == 2 * SIZE_I // 3
    rank = third.loader.groups[0].spec.residual[0].rank
    assert tuple(layer.w13_resmoe_u.shape) == (SIZE_E, SIZE_I // 3 * rank)


def test_sizes_are_named_one_by_one() -> None:
    names = SimpleNamespace(num_experts="num_experts", hidden_dim="hidden_size", intermediate_size="intermediate_size")
    for field, name in vars(names).items():
        value = getattr(Moe(), field) - 1
        with pytest.raises(FormatError, match=rf"says {name} {value + 1}, the model has {value}$"):
            create(Moe(**{field: value}))
