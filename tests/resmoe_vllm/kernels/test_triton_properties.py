"""What the Triton kernels must not depend on: order of programs, size of strides, other ranks' experts, code widths.

New memory is full of NaN, and block sizes are those of the rule.
"""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from compress_tools.format.schema import LayerSpec
from resmoe_vllm.kernels.activation import SILU
from resmoe_vllm.kernels.reference import fused_moe_ref
from resmoe_vllm.ops import BoundLayer
from resmoe_vllm.weights.bound import ResMoEWeights
from resmoe_vllm.weights.layer_loader import BoundGroup
from tests.resmoe_vllm.kernels.bounds import Precision, assert_within, layer_bound
from tests.resmoe_vllm.kernels.test_vllm_kernels import hidden_states, make_routing
from tests.resmoe_vllm.layers import layer_kinds, load_all, new_loader, parameters_of, store_layer
from tests.resmoe_vllm.twins import DOWN, GATE, UP, layer_spec, quantized

SIZE_I, SIZE_H = 33, 67
# a GPU has an order of its own, and no memory that is only mapped
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="in Triton's interpreter only")
KINDS = ("low_rank-joint", "bitmap-joint", "quantized-3bit", "trellis-2bit+low_rank")


@pytest.fixture(autouse=True)
def _nan_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def weights_of(spec: LayerSpec, experts: int = 4, **ranks: object) -> ResMoEWeights:
    """A loaded layer's, fp32."""
    layer = store_layer(spec, experts, SIZE_I, SIZE_H, "float32")
    module, loader = new_loader(layer, **ranks)
    load_all(module, loader, layer)
    (group,) = loader.bind(module)
    return group.weights


def check(weights: ResMoEWeights, routing: tuple[Tensor, Tensor], expert_map: Tensor | None = None) -> None:
    """The layer against ``fused_moe_ref``."""
    topk_weights, ids = routing
    x = hidden_states(len(ids), SIZE_H, "float32")
    expected = fused_moe_ref(x, topk_weights, ids, weights, SILU, expert_map)
    limit = layer_bound(x, topk_weights, ids, weights, SILU, Precision(x.dtype, x.dtype), expert_map)
    found = BoundLayer([BoundGroup(weights, None)], SILU, "cuda")(x, topk_weights, ids, expert_map)
    assert_within(found, expected, limit)


def backwards(count: int, program: int) -> int:
    return count - 1 - program


def scattered(count: int, program: int) -> int:
    step = next(prime for prime in (7, 11, 13, 5, 3, 1) if math.gcd(prime, count) == 1)
    return (program * step + count // 2) % count


@pytest.mark.parametrize("order", [backwards, scattered])
@pytest.mark.parametrize("kind", KINDS)
def test_no_program_waits_for_another(
    kind: str, order: Callable[[int, int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter runs programs one after the other: in another order the result is the same."""
    builder = type(interpreter.interpreter_builder)
    plain, counted = builder.set_grid_idx, []

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        counted.append(x)
        plain(self, *(order(size, at) for size, at in zip(self.grid_dim, (x, y, z), strict=True)))

    monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
    check(weights_of(layer_kinds(SIZE_I, SIZE_H)[kind]), make_routing(4, "T13-K2"))
    assert len(counted) > 20


@pytest.mark.parametrize("routing", ["T7-K1-padded", "T7-K2-padded", "T3-K2-all_padded", "T1-KE"])
@pytest.mark.parametrize("kind", KINDS)
def test_skipped_pairs_beside_experts_of_other_ranks(kind: str, routing: str) -> None:
    """K of 1, 2 and all; nothing is written for a pair that is skipped or elsewhere, and none of it may be read."""
    weights = weights_of(layer_kinds(SIZE_I, SIZE_H)[kind], local_experts=[3, 0])
    expert_map = torch.tensor([1, -1, -1, 0], dtype=torch.int32)
    check(weights, make_routing(4, routing), expert_map)


@pytest.mark.parametrize("kind", ["low_rank-joint", "quantized-8bit-each", "bitmap_rows"])
def test_experts_far_apart(kind: str) -> None:
    """More than 2^31 elements from one expert to the next; only touched pages of such a tensor are there."""
    layer = store_layer(layer_kinds(SIZE_I, SIZE_H)[kind], 2, SIZE_I, SIZE_H, "float32")
    module, loader = new_loader(layer)
    load_all(module, loader, layer)
    layout = loader.groups[0].layout
    # new memory full of NaN would be touched
    torch.use_deterministic_algorithms(False)
    apart = []
    for parameter in parameters_of(module, layout):
        columns = parameter.shape[1]
        # an octet of codes is one integer of up to eight bytes for a kernel
        stride = (2**31 + 64) * (8 // parameter.element_size() if parameter.dtype == torch.uint8 else 1)
        far = torch.empty(stride * (len(parameter) - 1) + columns, dtype=parameter.dtype)
        view = far.as_strided(parameter.shape, (stride, 1))
        view.copy_(parameter.data)
        apart.append(view)
    assert max(tensor.stride(0) for tensor in apart if len(tensor) > 1) > 2**31
    check(layout.bind(apart), make_routing(2, "T1-KE"))


@pytest.mark.parametrize("widths", [(2, 8), (3, 4), (4, 8)])
def test_widths_of_codes_side_by_side(widths: tuple[int, int]) -> None:
    """Gate's codes lie before up's in one parameter, and end anywhere."""
    gate, up = widths
    spec = layer_spec(quantized(gate, GATE), quantized(up, UP), quantized(4, DOWN))
    check(weights_of(spec, padded=True), make_routing(4, "T7-K2-padded"))
