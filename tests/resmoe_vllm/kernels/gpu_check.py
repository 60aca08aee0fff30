"""A layer's groups through the GPU kernels, held against the reference."""

from torch import Tensor

from resmoe_vllm.kernels.activation import SILU
from resmoe_vllm.kernels.gpu.layer import GpuKernel
from resmoe_vllm.kernels.reference import fused_moe_ref
from tests.resmoe_vllm.kernels.bounds import Precision, assert_within, layer_bound


def check(groups: tuple, x: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None = None) -> None:
    """One layer against the sum of its groups' references."""
    expected: Tensor | float = 0.0
    limit: Tensor | float = 0.0
    for group in groups:
        own = expert_map if group.expert_map is None else group.expert_map
        expected += fused_moe_ref(x, weights, ids, group.weights, SILU, own).float()
        limit += layer_bound(x, weights, ids, group.weights, SILU, Precision(x.dtype, x.dtype), own)
    assert_within(GpuKernel(groups, SILU)(x, weights, ids, expert_map), expected, limit)
