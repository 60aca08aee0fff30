"""Bounds of errors see a wrong sum: what a kernel may forget is outside of them, whatever it rounds to."""

import pytest
import torch
from torch import Tensor

from compress_tools.format.dtypes import DTYPES
from resmoe_vllm.kernels.activation import SILU
from resmoe_vllm.kernels.reference import fused_moe_ref, restore_ref
from resmoe_vllm.weights.bound import ResMoEWeights
from tests.resmoe_vllm.kernels.bounds import Precision, layer_bound, worst_share
from tests.resmoe_vllm.kernels.test_vllm_kernels import FLOATS, KINDS, hidden_states, make_routing
from tests.resmoe_vllm.layers import bound_weights, layer_kinds, load_all, new_loader, store_layer

SIZE_E, SIZE_I, SIZE_H = 4, 33, 67


def restore(layer: ResMoEWeights) -> list[tuple[Tensor, ...]]:
    """Gate, up and down of each expert, fp64."""
    names = ("gate_proj", "up_proj", "down_proj")
    return [tuple(restore_ref(layer, name, expert).double() for name in names) for expert in range(SIZE_E)]


def forgetful(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    experts: list[tuple[Tensor, ...]],
    column: int | None = None,
    row: int | None = None,
) -> Tensor:
    """The layer without one column's products in gate, or without one row's part of the result; fp64, rounded once."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for expert, (gate, up, down) in enumerate(experts):
        seen = x.double().clone()
        if column is not None:
            seen[:, column] = 0
        hidden = SILU(seen @ gate.T, x.double() @ up.T)
        if row is not None:
            hidden[:, row] = 0
        share = (weights.double() * (ids == expert)).sum(1, keepdim=True)
        out += share * (hidden @ down)
    return out.to(x.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_wrong_sum_is_outside_of_the_bound(kind: str, dtype: str) -> None:
    stored = store_layer(layer_kinds(SIZE_I, SIZE_H)[kind], SIZE_E, SIZE_I, SIZE_H, dtype)
    module, loader = new_loader(stored)
    load_all(module, loader, stored)
    layer = bound_weights(module, loader)
    weights, ids = make_routing(SIZE_E, "T13-K2")
    x = hidden_states(13, SIZE_H, dtype)
    experts = restore(layer)
    expected = fused_moe_ref(x, weights, ids, layer, SILU)
    # The widest bound: of a kernel that rounds operands of products to the dtype.
    limit = layer_bound(x, weights, ids, layer, SILU, Precision(DTYPES[dtype], x.dtype))

    def share(wrong: Tensor) -> float:
        return worst_share(wrong, expected, limit)

    assert share(forgetful(x, weights, ids, experts)) <= 1
    assert min(share(forgetful(x, weights, ids, experts, column=column)) for column in range(SIZE_H)) > 1
    assert min(share(forgetful(x, weights, ids, experts, row=row)) for row in range(SIZE_I)) > 1
    for expert in range(SIZE_E):
        without = ids.masked_fill(ids == expert, -1)
        assert share(fused_moe_ref(x, weights, without, layer, SILU)) > 1
    assert share(torch.zeros_like(expected)) > 1
