"""The GPU's kernels: Triton for every coder (layer.py)."""

from typing import TYPE_CHECKING

from resmoe_vllm.kernels.activation import Activation
from resmoe_vllm.weights.bound import ResMoEWeights

if TYPE_CHECKING:
    from resmoe_vllm.kernels.gpu.layer import GpuKernel


def bind(weights: ResMoEWeights, activation: Activation) -> "GpuKernel":
    """One layer, or group of experts, bound to the kernels."""
    # here: a machine without a GPU need not have Triton
    from resmoe_vllm.kernels.gpu.layer import GpuKernel

    return GpuKernel(weights, activation)
