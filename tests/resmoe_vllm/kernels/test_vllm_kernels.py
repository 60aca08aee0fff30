"""The op against ``fused_moe_ref`` over the shape grid, ``fused_moe_ref`` against ``restore_expert``."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu
from vllm.forward_context import override_forward_context

from compress_tools.format.dtypes import DTYPES
from compress_tools.format.tensors import BIAS
from resmoe_vllm.kernels.activation import SILU
from resmoe_vllm.kernels.cpu import native, plain_torch
from resmoe_vllm.kernels.reference import fused_moe_ref
from resmoe_vllm.ops import BoundLayer
from resmoe_vllm.weights.layer_loader import LayerLoader
from tests.resmoe_vllm.kernels.bounds import Precision, assert_within, layer_bound
from tests.resmoe_vllm.layers import (
    StoredLayer,
    bind_layer,
    bound_weights,
    grouped_layer,
    layer_kinds,
    load_all,
    new_loader,
    store_layer,
)

FLOATS = ("float32", "bfloat16", "float16")
KINDS = tuple(layer_kinds(3, 3))
# (E, I, H) and why
SIZES = {
    "E4-I33-H67": (4, 33, 67),  # odd; a mask row of two words, the second almost empty
    "E3-I16-H64": (3, 16, 64),  # mask rows without padding
    "E2-I5-H3": (2, 5, 3),  # less than one byte of mask
}
# (T, K) and routing
ROUTINGS = {
    "T0-K2": (0, 2, "random"),
    "T1-K1": (1, 1, "random"),
    "T1-KE": (1, None, "random"),  # every expert
    "T13-K2": (13, 2, "random"),
    "T13-K2-empty": (13, 2, "no last expert"),  # the last expert gets nothing
    "T9-K1-one": (9, 1, "one expert"),
    "T7-K2-padded": (7, 2, "padded"),  # some ids -1
    "T3-K2-all_padded": (3, 2, "all padded"),
    "T7-K1-padded": (7, 1, "padded"),  # a token's only expert is elsewhere
    "T101-K2": (101, 2, "random"),  # more tokens than a block of the C++ kernel
}


def make_routing(num_experts: int, name: str, seed: int = 1) -> tuple[Tensor, Tensor]:
    """(topk_weights fp32 [T, K], topk_ids int32 [T, K]); distinct experts per token."""
    tokens, top_k, kind = ROUTINGS[name]
    top_k = num_experts if top_k is None else top_k
    generator = torch.Generator().manual_seed(seed)
    choices = num_experts - 1 if kind == "no last expert" and num_experts > top_k else num_experts
    ids = torch.rand(tokens, choices, generator=generator).argsort(1)[:, :top_k].int()
    weights = torch.rand(tokens, top_k, generator=generator)
    if kind == "one expert":
        ids.fill_(1)
    if kind == "padded":
        ids[::2, 0] = -1
    if kind == "all padded":
        ids.fill_(-1)
    return weights, ids


def run_op(x, weights, ids, module, loader, activation=SILU, expert_map=None) -> Tensor:
    """What ``torch.ops.resmoe.fused_moe`` runs."""
    return bind_layer(module, loader, activation)(x, weights, ids, expert_map)


def run_ref(x, weights, ids, module, loader, activation=SILU, expert_map=None) -> Tensor:
    """``fused_moe_ref`` on the same parameters."""
    bound = bound_weights(module, loader)
    return fused_moe_ref(x, weights, ids, bound, activation, expert_map)


def op_products(dtype: torch.dtype) -> torch.dtype:
    """What the CPU's kernel rounds operands of products to: in C++ what codes are multiplied with to 16 bits.

    Of fp32 numbers it multiplies twice 16 bits.
    """
    if native.load():
        return torch.float32 if dtype == torch.float32 else torch.int16
    return plain_torch.product_dtype(dtype)


def bound_of(x, weights, ids, module, loader, products: torch.dtype, activation=SILU, expert_map=None) -> Tensor:
    """``layer_bound`` of the same parameters."""
    bound = bound_weights(module, loader)
    return layer_bound(x, weights, ids, bound, activation, Precision(products, x.dtype), expert_map)


def hidden_states(tokens: int, size_h: int, dtype: str) -> Tensor:
    """Seeded x [T, H]."""
    return torch.randn(tokens, size_h, generator=torch.Generator().manual_seed(2)).to(DTYPES[dtype])


@pytest.fixture(scope="module")
def loaded():
    """``loaded(kind, size, dtype)`` -> (StoredLayer, module, loader); made once."""
    made: dict[tuple[str, str, str], tuple] = {}

    def get(kind: str, size: str, dtype: str) -> tuple:
        if (kind, size, dtype) not in made:
            experts, size_i, size_h = SIZES[size]
            layer = store_layer(layer_kinds(size_i, size_h)[kind], experts, size_i, size_h, dtype)
            module, loader = new_loader(layer)
            load_all(module, loader, layer)
            made[kind, size, dtype] = layer, module, loader
        return made[kind, size, dtype]

    return get


def clamped_swiglu(limit: float, alpha: float, beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    """As OpenAI writes it for gpt-oss."""

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        return gate * torch.sigmoid(alpha * gate) * (up + beta)

    return swiglu


# Written down, not taken from the plugin's table, by vLLM's name.
DENSE_ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda gate, up: silu(gate) * up,
    "gelu": lambda gate, up: gelu(gate) * up,
    "gelu_tanh": lambda gate, up: gelu(gate, approximate="tanh") * up,
    "swigluoai": clamped_swiglu(7.0, 1.702, 1.0),
    "swigluoai_uninterleave": lambda gate, up: silu(gate) * up,
    "swiglustep": lambda gate, up: silu(gate).clamp(max=7.0) * up.clamp(-7.0, 7.0),
    "silu_no_mul": lambda _, up: silu(up),
    "gelu_no_mul": lambda _, up: gelu(up),
    "gelu_tanh_no_mul": lambda _, up: gelu(up, approximate="tanh"),
    "relu2_no_mul": lambda _, up: up.clamp(min=0) ** 2,
}


def dense_loop(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    layer: StoredLayer,
    act: Callable[[Tensor, Tensor], Tensor] = DENSE_ACTIVATIONS["silu"],
) -> Tensor:
    """Token by token, choice by choice, on restored experts; fp64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for choice in range(ids.shape[1]):
            expert = int(ids[token, choice])
            if expert >= 0:
                rows = {p: part.double() for p, part in layer.restored(expert).items()}
                row = x[token].double()
                bias = {p: layer.experts[expert][p, BIAS].double() if layer.fmt.biases else 0 for p in rows}
                up = rows["up_proj"] @ row + bias["up_proj"]
                gate = rows["gate_proj"] @ row + bias["gate_proj"] if "gate_proj" in rows else up
                down = act(gate, up) @ rows["down_proj"] + bias["down_proj"]
                out[token] += weights[token, choice].double() * down
    return out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_restore_expert_and_a_dense_loop(loaded, kind: str, size: str) -> None:
    layer, module, loader = loaded(kind, size, "float32")
    weights, ids = make_routing(layer.fmt.num_experts, "T7-K2-padded")
    x = hidden_states(7, layer.fmt.hidden_size, "float32")
    expected = dense_loop(x, weights, ids, layer)
    assert expected.abs().max() > 0.01
    limit = bound_of(x, weights, ids, module, loader, torch.float32)
    assert_within(run_ref(x, weights, ids, module, loader), expected, limit)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_op_is_the_reference(loaded, kind: str, size: str, dtype: str) -> None:
    """Every routing."""
    layer, module, loader = loaded(kind, size, dtype)
    for routing in ROUTINGS:
        weights, ids = make_routing(layer.fmt.num_experts, routing)
        x = hidden_states(ids.shape[0], layer.fmt.hidden_size, dtype)
        before = x.clone()
        found = run_op(x, weights, ids, module, loader)
        limit = bound_of(x, weights, ids, module, loader, op_products(x.dtype))
        assert found.dtype == x.dtype
        assert_within(found, run_ref(x, weights, ids, module, loader), limit)
        assert found.is_contiguous()
        assert torch.equal(x, before)
        assert found.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() or not x.numel()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_torch_kernel_is_the_reference(loaded, kind: str, size: str, dtype: str) -> None:
    """Every routing; the op may pick another kernel for so few tokens."""
    layer, module, loader = loaded(kind, size, dtype)
    bound = bound_weights(module, loader)
    for routing in ROUTINGS:
        weights, ids = make_routing(layer.fmt.num_experts, routing)
        x = hidden_states(ids.shape[0], layer.fmt.hidden_size, dtype)
        found = plain_torch.fused_moe(x, weights, ids, bound, SILU)
        limit = layer_bound(x, weights, ids, bound, SILU, Precision(plain_torch.product_dtype(x.dtype), x.dtype))
        assert found.dtype == x.dtype
        assert_within(found, fused_moe_ref(x, weights, ids, bound, SILU), limit)


@pytest.mark.parametrize("kind", KINDS)
def test_expert_ranks_add_up(loaded, kind: str) -> None:
    layer, module, loader = loaded(kind, "E4-I33-H67", "float32")
    weights, ids = make_routing(4, "T7-K2-padded")
    x = hidden_states(7, 67, "float32")
    total = torch.zeros(7, 67)
    for local in ([1], [3, 0, 2]):
        part, part_loader = new_loader(layer, local_experts=local)
        load_all(part, part_loader, layer)
        expert_map = torch.full((4,), -1, dtype=torch.int32)
        expert_map[local] = torch.arange(len(local), dtype=torch.int32)
        found = run_op(x, weights, ids, part, part_loader, expert_map=expert_map)
        limit = bound_of(x, weights, ids, part, part_loader, torch.float32, expert_map=expert_map)
        assert_within(found, run_ref(x, weights, ids, part, part_loader, expert_map=expert_map), limit)
        total += found
    limit = bound_of(x, weights, ids, module, loader, torch.float32)
    assert_within(total, run_op(x, weights, ids, module, loader), limit)


@pytest.mark.parametrize("reverse", [False, True], ids=["in_order", "reversed"])
@pytest.mark.parametrize("kind", KINDS)
def test_tensor_ranks_add_up(loaded, kind: str, reverse: bool) -> None:
    layer, module, loader = loaded(kind, "E4-I33-H67", "float32")
    weights, ids = make_routing(4, "T13-K2")
    x = hidden_states(13, 67, "float32")
    total = torch.zeros(13, 67)
    for rank in range(3):
        part, part_loader = new_loader(layer, tp_size=3, tp_rank=rank)
        load_all(part, part_loader, layer, reverse)
        found = run_op(x, weights, ids, part, part_loader)
        limit = bound_of(x, weights, ids, part, part_loader, torch.float32)
        assert_within(found, run_ref(x, weights, ids, part, part_loader), limit)
        total += found
    limit = bound_of(x, weights, ids, module, loader, torch.float32)
    assert_within(total, run_op(x, weights, ids, module, loader), limit)


@pytest.fixture(scope="module")
def grouped() -> StoredLayer:
    """Four experts in three groups, E4 I33 H67, fp32."""
    return store_layer(grouped_layer(33, 67), 4, 33, 67, "float32")


def group_bound(x: Tensor, weights: Tensor, ids: Tensor, module: torch.nn.Module, loader: LayerLoader) -> Tensor:
    """Sum of the groups' bounds; all experts are here."""
    total = torch.zeros(x.shape, dtype=torch.float64)
    for group in loader.bind(module):
        precision = Precision(torch.float32, x.dtype)
        total += layer_bound(x, weights, ids, group.weights, SILU, precision, group.expert_map)
    return total


@pytest.mark.parametrize("routing", ROUTINGS)
def test_groups_of_experts_add_up(grouped: StoredLayer, routing: str) -> None:
    module, loader = new_loader(grouped)
    load_all(module, loader, grouped)
    assert len(loader.bind(module)) == 3
    weights, ids = make_routing(4, routing)
    x = hidden_states(ids.shape[0], 67, "float32")
    limit = group_bound(x, weights, ids, module, loader)
    assert_within(run_op(x, weights, ids, module, loader), dense_loop(x, weights, ids, grouped), limit)


@pytest.mark.parametrize("ranks", ["tensor", "expert"])
def test_ranks_of_groups_add_up(grouped: StoredLayer, ranks: str) -> None:
    parallel = {
        "tensor": [{"tp_size": 3, "tp_rank": rank} for rank in range(3)],
        # the first rank has no expert of the third group, the second none of the second
        "expert": [{"local_experts": [2, 3]}, {"local_experts": [0, 1]}],
    }[ranks]
    weights, ids = make_routing(4, "T13-K2")
    x = hidden_states(13, 67, "float32")
    total = torch.zeros(13, 67)
    groups = []
    for options in parallel:
        part, loader = new_loader(grouped, **options)
        load_all(part, loader, grouped, reverse=True)
        groups.append(len(loader.bind(part)))
        total += run_op(x, weights, ids, part, loader)
    assert groups == ([3, 3, 3] if ranks == "tensor" else [2, 2])
    whole, loader = new_loader(grouped)
    load_all(whole, loader, grouped)
    assert_within(total, dense_loop(x, weights, ids, grouped), group_bound(x, weights, ids, whole, loader))


@pytest.mark.parametrize("routing", ["T0-K2", "T13-K2"])
@pytest.mark.parametrize("kind", ["low_rank-joint", "bitmap-joint", "both", "low_rank+bitmap+quantized"])
def test_opcheck(loaded, kind: str, routing: str) -> None:
    _, module, loader = loaded(kind, "E4-I33-H67", "float32")
    weights, ids = make_routing(4, routing)
    x = hidden_states(ids.shape[0], 67, "float32")
    expert_map = torch.tensor([2, -1, 0, 1], dtype=torch.int32)
    with forward_pass(layer=bind_layer(module, loader)):
        for mapping in (None, expert_map):
            results = torch.library.opcheck(torch.ops.resmoe.fused_moe, (x, weights, ids, mapping, "layer"))
            assert set(results.values()) == {"SUCCESS"}


@contextmanager
def forward_pass(**layers: BoundLayer) -> Iterator[None]:
    """VLLM's forward context of an engine that has these layers."""
    context = SimpleNamespace(
        no_compile_layers={
            name: SimpleNamespace(routed_experts=SimpleNamespace(quant_method=SimpleNamespace(bound=bound)))
            for name, bound in layers.items()
        }
    )
    with override_forward_context(context):
        yield


def test_engines_of_one_process_have_their_own_layers(loaded) -> None:
    """Two engines' layers have one name; a compiled graph finds that of the engine which runs it."""
    weights, ids = make_routing(4, "T13-K2")
    x = hidden_states(13, 67, "float32")
    bound = [bind_layer(*loaded(kind, "E4-I33-H67", "float32")[1:]) for kind in ("low_rank-joint", "bitmap-joint")]
    expected = [layer(x, weights, ids) for layer in bound]
    assert not torch.equal(*expected)
    compiled = torch.compile(lambda *args: torch.ops.resmoe.fused_moe(*args, None, "layer"), backend="aot_eager")
    for layer, result in zip(bound * 2, expected * 2, strict=True):
        with forward_pass(layer=layer):
            assert torch.equal(compiled(x, weights, ids), result)


def test_a_layer_is_released_with_its_owner() -> None:
    layer = store_layer(layer_kinds(5, 3)["both"], 2, 5, 3, "float32")
    module, loader = new_loader(layer)
    load_all(module, loader, layer)
    bound = bind_layer(module, loader)
    memory = [weakref.ref(param) for param in module.parameters()]
    assert bound(hidden_states(1, 3, "float32"), *make_routing(2, "T1-K1")).isfinite().all()
    del module, loader, bound
    gc.collect()
    assert [reference() for reference in memory] == [None] * len(memory)


@pytest.mark.skipif(native.load() is None, reason="torch's own products don't promise it")
@pytest.mark.parametrize("kind", layer_kinds(40, 128))
@pytest.mark.parametrize(("dtype", "columns"), [("float32", 128), ("bfloat16", 128), ("float32", 333)])
def test_a_tokens_result_does_not_depend_on_its_batch(kind: str, dtype: str, columns: int) -> None:
    """Bit for bit, from one token to many blocks of them; all tokens at each expert."""
    layer = store_layer(layer_kinds(40, columns)[kind], 4, 40, columns, dtype)
    module, loader = new_loader(layer)
    load_all(module, loader, layer)
    x = hidden_states(1000, columns, dtype)
    generator = torch.Generator().manual_seed(5)
    ids = torch.rand(1000, 4, generator=generator).argsort(1).int()
    weights = torch.rand(1000, 4, generator=generator)
    run = bind_layer(module, loader)

    def some(begin: int, size: int) -> Tensor:
        tokens = slice(begin, begin + size)
        return run(x[tokens], weights[tokens], ids[tokens])

    alone = torch.cat([some(token, 1) for token in range(1000)])
    for size in (60, 64, 65, 80, 256, 1000):
        assert torch.equal(some(0, size), alone[:size])
    for begin in (0, 1, 50, 995):
        for size in range(2, 6):
            assert torch.equal(some(begin, size), alone[begin : begin + size])
