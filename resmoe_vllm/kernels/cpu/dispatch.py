"""The CPU's kernel. Two strategies, same result: C++, and torch for many tokens where that has native products.

The C++ kernel multiplies with AVX2. Processors that multiply bf16 or fp16 in hardware (AVX-512, AMX) are left to
torch once an expert meets enough tokens.
"""

from torch import Tensor

from resmoe_vllm.kernels.activation import Activation
from resmoe_vllm.kernels.cpu import native, plain_torch
from resmoe_vllm.weights.bound import ResMoEWeights

# Above, where torch has native products, they win over reading each weight once for four tokens.
MAX_CPP_TOKENS = 64


class CpuKernel:
    """One layer, or group of experts, bound to both strategies.

    Args:
        weights: contiguous, on the CPU.
        activation: the experts'.
    """

    def __init__(self, weights: ResMoEWeights, activation: Activation) -> None:
        self._weights, self._activation = weights, activation
        library = native.load()
        self._native = None if library is None else native.NativeKernel(library, weights, activation)

    def __call__(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None = None) -> Tensor:
        """See ``fused_moe_ref``."""
        few = len(x) <= MAX_CPP_TOKENS or plain_torch.product_dtype(x.dtype) != x.dtype
        if few and self._native is not None:
            return self._native(x, topk_weights, topk_ids, expert_map)
        return plain_torch.fused_moe(x, topk_weights, topk_ids, self._weights, self._activation, expert_map)
