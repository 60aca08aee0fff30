"""Activations, biases and experts without a gate: every executor against the reference, at random shapes."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from compress_tools.errors import KernelUnsupportedError
from resmoe_vllm.kernels.activation import ACTIVATIONS, SILU, Activation, make_activation
from resmoe_vllm.kernels.cpu import native, plain_torch
from resmoe_vllm.kernels.gpu import layer as gpu_layer
from resmoe_vllm.kernels.reference import fused_moe_ref
from resmoe_vllm.weights.layer_loader import BoundGroup
from tests.resmoe_vllm.kernels.bounds import Precision, assert_within, layer_bound
from tests.resmoe_vllm.kernels.test_vllm_kernels import (
    DENSE_ACTIVATIONS,
    clamped_swiglu,
    dense_loop,
    hidden_states,
    op_products,
)
from tests.resmoe_vllm.layers import (
    StoredLayer,
    bind_layer,
    bound_weights,
    layer_kinds,
    load_all,
    new_loader,
    store_layer,
    ungated_kinds,
)

# (activation, what it is, written down): each of vLLM's names, and what models pass beside a name.
CASES = {name: (ACTIVATIONS[name], DENSE_ACTIVATIONS[name]) for name in ACTIVATIONS} | {
    # DeepSeek-V4 and GLM-5.3-Flash clamp SiLU, MiniMax-M3 says all three; small limits, so that they count here.
    "silu-limit": (make_activation("silu", limit=0.6), clamped_swiglu(0.6, 1.0, 0.0)),
    "swigluoai_uninterleave-all": (
        make_activation("swigluoai_uninterleave", limit=0.7, alpha=1.702, beta=1.0),
        clamped_swiglu(0.7, 1.702, 1.0),
    ),
    "swigluoai-limit": (make_activation("swigluoai", limit=0.4), clamped_swiglu(0.4, 1.702, 1.0)),
    "swiglustep-limit": (
        make_activation("swiglustep", limit=0.5),
        lambda gate, up: torch.nn.functional.silu(gate).clamp(max=0.5) * up.clamp(-0.5, 0.5),
    ),
}


@dataclass(frozen=True)
class Case:
    """One random layer, routing and input."""

    layer: StoredLayer
    x: Tensor
    weights: Tensor
    ids: Tensor


def random_case(activation: Activation, biases: bool, dtype: str, seed: int) -> Case:
    """Everything by the seed: sizes, tokens, choices (one of them, too), coder."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    experts, size_i, size_h, tokens = pick(1, 5), pick(1, 40), pick(1, 140), pick(1, 20)
    top_k = 1 if seed % 2 else pick(1, experts)
    kinds = (layer_kinds if activation.gated else ungated_kinds)(size_i, size_h)
    spec = list(kinds.values())[pick(0, len(kinds) - 1)]
    layer = store_layer(spec, experts, size_i, size_h, dtype, seed, biases=biases)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k].int()
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = -1
    return Case(layer, hidden_states(tokens, size_h, dtype), torch.rand(ids.shape, generator=generator), ids)


def load(layer: StoredLayer, **ranks: object):
    """(parameters, loader), loaded."""
    module, loader = new_loader(layer, **ranks)
    load_all(module, loader, layer)
    return module, loader


@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_a_dense_loop(name: str, biases: bool) -> None:
    activation, dense = CASES[name]
    largest = 0.0
    for seed in range(6):
        case = random_case(activation, biases, "float32", seed)
        weights = bound_weights(*load(case.layer))
        found = fused_moe_ref(case.x, case.weights, case.ids, weights, activation)
        expected = dense_loop(case.x, case.weights, case.ids, case.layer, dense)
        limit = layer_bound(
            case.x, case.weights, case.ids, weights, activation, Precision(torch.float32, torch.float32)
        )
        assert_within(found, expected, limit)
        largest = max(largest, expected.abs().max().item())
    assert largest > 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("name", CASES)
def test_every_executor_gives_the_reference(name: str, biases: bool, dtype: str) -> None:
    """Plain torch, C++ and Triton (in its interpreter without a GPU)."""
    activation, _ = CASES[name]
    library = native.load()
    for seed in range(4) if dtype == "float32" else (4, 5):
        case = random_case(activation, biases, dtype, seed)
        weights = bound_weights(*load(case.layer))
        inputs = case.x, case.weights, case.ids
        expected = fused_moe_ref(*inputs, weights, activation)
        found = {
            plain_torch.product_dtype(case.x.dtype): [plain_torch.fused_moe(*inputs, weights, activation)],
        }
        if library is not None:
            found.setdefault(op_products(case.x.dtype), []).append(
                native.NativeKernel(library, weights, activation)(*inputs)
            )
        if not torch.cuda.is_available():
            found.setdefault(case.x.dtype, []).append(
                gpu_layer.GpuKernel([BoundGroup(weights, None)], activation)(*inputs)
            )
        for products, results in found.items():
            limit = layer_bound(*inputs, weights, activation, Precision(products, case.x.dtype))
            for result in results:
                assert_within(result, expected, limit)


@pytest.mark.parametrize("name", ["swigluoai", "silu-limit", "relu2_no_mul"])
def test_tensor_ranks_add_up_with_biases(name: str) -> None:
    """The bias of down counts once."""
    activation, dense = CASES[name]
    kinds = layer_kinds(33, 67) if activation.gated else ungated_kinds(33, 67)
    for spec in kinds.values():
        layer = store_layer(spec, 4, 33, 67, "float32", biases=True)
        x = hidden_states(5, 67, "float32")
        ids = torch.rand(5, 4, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :2].int()
        weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(2))
        ranks = [bind_layer(*load(layer, tp_size=3, tp_rank=rank), activation) for rank in range(3)]
        total = torch.stack([rank(x, weights, ids) for rank in ranks]).sum(0)
        whole = bound_weights(*load(layer))
        limit = layer_bound(x, weights, ids, whole, activation, Precision(torch.float32, torch.float32))
        assert_within(total, dense_loop(x, weights, ids, layer, dense), limit)


@pytest.mark.parametrize("name", ["swigluoai", "relu2_no_mul"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tokens_result_does_not_depend_on_its_batch(name: str, dtype: str) -> None:
    """Bit for bit, in the C++ kernel, with biases."""
    library = native.load()
    if library is None:
        pytest.skip("no C++ kernel here")
    activation, _ = CASES[name]
    for spec in (layer_kinds(40, 128) if activation.gated else ungated_kinds(40, 128)).values():
        layer = store_layer(spec, 4, 40, 128, dtype, biases=True)
        run = native.NativeKernel(library, bound_weights(*load(layer)), activation)
        x = hidden_states(40, 128, dtype)
        ids = torch.rand(40, 4, generator=torch.Generator().manual_seed(5)).argsort(1)[:, :3].int()
        weights = torch.rand(40, 3, generator=torch.Generator().manual_seed(6))
        together = run(x, weights, ids)
        for token in range(0, 40, 7):
            some = slice(token, token + 1 + token % 3)
            assert torch.equal(run(x[some], weights[some], ids[some]), together[some])


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_a_number_stays_one(name: str) -> None:
    """A clamp doesn't hide it."""
    activation, _ = CASES[name]
    spec = (layer_kinds if activation.gated else ungated_kinds)(8, 16)
    layer = store_layer(next(iter(spec.values())), 2, 8, 16, "float32", biases=True)
    weights = bound_weights(*load(layer))
    x = hidden_states(2, 16, "float32")
    x[0, 3] = float("nan")
    inputs = x, torch.ones(2, 1), torch.tensor([[0], [1]], dtype=torch.int32)
    library = native.load()
    results = [fused_moe_ref(*inputs, weights, activation), plain_torch.fused_moe(*inputs, weights, activation)]
    if library is not None:
        results.append(native.NativeKernel(library, weights, activation)(*inputs))
    if not torch.cuda.is_available():
        results.append(gpu_layer.GpuKernel([BoundGroup(weights, None)], activation)(*inputs))
    for result in results:
        assert result[0].isnan().all()
        assert result[1].isfinite().all()


def test_settings_without_a_name_of_their_own() -> None:
    assert make_activation("silu") == SILU
    assert make_activation("swigluoai") == make_activation("swigluoai_uninterleave", 7.0, 1.702, 1.0)
    assert make_activation("swigluoai", limit=10.0) == Activation("silu", limit=10.0, alpha=1.702, beta=1.0)
    assert make_activation("silu", limit=10.0) == Activation("silu", limit=10.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("situ",), r"no activation 'situ'; it has: gelu, .*swigluoai_uninterleave, swiglustep$"),
        (("gelu", 7.0), r"no swiglu_limit 7\.0 of activation 'gelu'; only SwiGLU"),
        (("relu2_no_mul", None, 1.7, 1.0), r"no swiglu_alpha 1\.7, swiglu_beta 1\.0 of activation 'relu2_no_mul'"),
        (("silu", 0.0), r"no swiglu_limit 0\.0; expected a number above 0"),
        (("silu", float("nan")), r"no swiglu_limit nan; expected a number above 0"),
    ],
    ids=["unknown", "gelu_limit", "relu2_alpha", "limit_0", "limit_nan"],
)
def test_what_no_kernel_has_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(KernelUnsupportedError, match=message):
        make_activation(*arguments)
