"""The CPU's kernel: C++ at every number of tokens, and plain torch, same result, where it cannot be built."""

from torch import Tensor

from resmoe_vllm.kernels.activation import Activation
from resmoe_vllm.kernels.cpu import native, plain_torch
from resmoe_vllm.weights.bound import ResMoEWeights


class PlainKernel:
    """One layer, or group of experts, in plain torch.

    Args:
        weights: contiguous, on the CPU.
        activation: the experts'.
    """

    def __init__(self, weights: ResMoEWeights, activation: Activation) -> None:
        self._weights, self._activation = weights, activation

    def __call__(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None = None) -> Tensor:
        """See ``fused_moe_ref``."""
        return plain_torch.fused_moe(x, topk_weights, topk_ids, self._weights, self._activation, expert_map)


def bind(weights: ResMoEWeights, activation: Activation) -> native.NativeKernel | PlainKernel:
    """One layer, or group of experts, bound to its kernel.

    The number of tokens does not choose between the two: a token's bits would depend on its batch, and torch keeps a
    oneDNN primitive for each shape that it has multiplied.

    Args:
        weights: contiguous, on the CPU.
        activation: the experts'.
    """
    library = native.load()
    if library is None:
        return PlainKernel(weights, activation)
    return native.NativeKernel(library, weights, activation)
