"""The GPU's kernels: Triton for every coder (layer.py)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from resmoe_vllm.compat import is_batch_invariant
from resmoe_vllm.kernels.activation import Activation
from resmoe_vllm.weights.layer_loader import BoundGroup

if TYPE_CHECKING:
    from resmoe_vllm.kernels.gpu.layer import GpuKernel


def bind(groups: Sequence[BoundGroup], activation: Activation) -> "GpuKernel":
    """One layer bound to the kernels."""
    # here: a machine without a GPU need not have Triton
    from resmoe_vllm.kernels.gpu.layer import GpuKernel

    return GpuKernel(groups, activation, batch_invariant=is_batch_invariant())
