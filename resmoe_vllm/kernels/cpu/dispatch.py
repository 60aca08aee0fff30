"""The CPU's kernel: C++ at every number of tokens, and plain torch, same result, where it cannot be built."""

from collections.abc import Sequence

import torch
from torch import Tensor

from resmoe_vllm.kernels.activation import Activation
from resmoe_vllm.kernels.cpu import native, plain_torch
from resmoe_vllm.weights.bound import ResMoEWeights
from resmoe_vllm.weights.layer_loader import BoundGroup


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


class GroupedKernel:
    """A layer whose experts are coded in several groups: a kernel for each.

    Args:
        groups: those with experts on this rank.
        activation: the experts'.
    """

    def __init__(self, groups: Sequence[BoundGroup], activation: Activation) -> None:
        self._groups = [(bind(group.weights, activation), group.expert_map) for group in groups]

    def __call__(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None = None) -> Tensor:
        """See ``fused_moe_ref``."""
        partial = [
            kernel(x, topk_weights, topk_ids, expert_map if own_map is None else own_map)
            for kernel, own_map in self._groups
        ]
        # Each group of experts sees its own routed pairs, center included: the sum has every pair once.
        return torch.stack(partial).sum(0, dtype=torch.float32).to(x.dtype)


def bind_layer(
    groups: Sequence[BoundGroup], activation: Activation
) -> native.NativeKernel | PlainKernel | GroupedKernel:
    """One layer bound to its kernel; by far the most have one group, with vLLM's own map."""
    if len(groups) == 1 and groups[0].expert_map is None:
        return bind(groups[0].weights, activation)
    return GroupedKernel(groups, activation)
