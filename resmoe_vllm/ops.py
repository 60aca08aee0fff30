"""The custom op ``torch.ops.resmoe.fused_moe``, the table of kernels, and the bound layer that the op runs.

A layer's weights are bound to their kernel once, after loading. The op is given the layer's name alone and finds the
layer in vLLM's forward context, as vLLM's own ``moe_forward`` does: a name is the same in every process, so a compiled
graph that comes from vLLM's cache still finds its layer, each engine of a process has names of its own, and what an
engine holds goes when it goes. Weights need not be arguments: the op changes none of them, so nothing is lost to
functionalisation, and a CUDA graph replays their addresses, which vLLM's sleep (level 1) gives back.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from compress_tools.errors import KernelUnsupportedError
from compress_tools.format.schema import (
    BitmapResidual,
    LowRankResidual,
    QuantizedCenter,
    QuantizedResidual,
    RowBitmapResidual,
    TrellisCenter,
    TrellisResidual,
)
from resmoe_vllm.compat import direct_register_custom_op, quant_method_of
from resmoe_vllm.kernels.activation import Activation
from resmoe_vllm.kernels.cpu import dispatch as cpu
from resmoe_vllm.kernels.cpu import native
from resmoe_vllm.kernels.cpu.rows8 import rows8
from resmoe_vllm.kernels.gpu import dispatch as gpu
from resmoe_vllm.weights.layer_loader import BoundGroup


class Kernel(Protocol):
    """One layer bound to a device's kernels."""

    def __call__(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None = None) -> Tensor:
        """See ``fused_moe_ref``."""


@runtime_checkable
class CompiledOnFirstCall(Protocol):
    """A kernel that would be compiled while a request waits."""

    def warm_up(self, top_k: int, dtype: torch.dtype, device: torch.device, expert_map: Tensor | None) -> None:
        """See ``BoundLayer.warm_up``."""


# The parts that the kernels read, in each of their forms.
CODERS = frozenset(
    coder
    for part in (
        BitmapResidual,
        RowBitmapResidual,
        LowRankResidual,
        QuantizedResidual,
        QuantizedCenter,
        TrellisResidual,
        TrellisCenter,
    )
    for coder in part.kernel_coders
)
# By device type; each reads all of ``CODERS`` and every activation.
KERNELS: dict[str, Callable[[Sequence[BoundGroup], Activation], Kernel]] = {"cpu": cpu.bind_layer, "cuda": gpu.bind}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# the library's life is the op's
_LIBRARY = torch.library.Library("resmoe", "FRAGMENT")


def check_kernel(coders: frozenset[str], dtype: torch.dtype, device: str) -> None:
    """Whether there is a kernel.

    Args:
        coders: ``LayerLayout.coders``.
        dtype: of x and of weights in the model's dtype.
        device: device type.
    Raises:
        KernelUnsupportedError: there is none; lists what there is.
    """
    if unknown := coders - CODERS:
        raise KernelUnsupportedError(
            f"resmoe has no kernel for {', '.join(sorted(unknown))}; it has: {', '.join(sorted(CODERS))}"
        )
    if device not in KERNELS or dtype not in DTYPES:
        names = [str(known).removeprefix("torch.") for known in (dtype, *DTYPES)]
        raise KernelUnsupportedError(
            f"resmoe has no kernel in {names[0]} on {device}; it has: {', '.join(names[1:])} on {' and '.join(KERNELS)}"
        )


def describe_kernel(device: str) -> str:
    """What serves a bound layer on a device, in words."""
    return native.loaded().words if device == "cpu" else "Triton"


class BoundLayer:
    """One layer on one rank, bound to its device's kernel.

    Args:
        groups: those with experts on this rank.
        activation: the experts'.
        device: device type of the weights.
    """

    def __init__(self, groups: Sequence[BoundGroup], activation: Activation, device: str) -> None:
        self._kernel = KERNELS[device](groups, activation)

    def __call__(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None = None) -> Tensor:
        """This rank's partial sum over the routed experts.

        Args:
            x: hidden states ``[T, H]``.
            topk_weights: router weights ``[T, K]``, fp32.
            topk_ids: global expert ids ``[T, K]``; negative ones are skipped.
            expert_map: ``[E]`` global -> local expert, -1 elsewhere; None when all experts are here. Groups have their
                own.
        Returns:
            ``[T, H]``, x's dtype, fresh.
        """
        return self._kernel(x, topk_weights, topk_ids, expert_map)

    def warm_up(self, top_k: int, dtype: torch.dtype, device: torch.device, expert_map: Tensor | None) -> None:
        """Compile what requests will run, where kernels are compiled when they are first called.

        Args:
            top_k: K.
            dtype: the model's.
            device: the weights'.
            expert_map: as in the calls.
        """
        if isinstance(self._kernel, CompiledOnFirstCall):
            self._kernel.warm_up(top_k, dtype, device, expert_map)


def fused_moe(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None, layer_name: str) -> Tensor:
    """Routed experts of one layer on one rank: see ``BoundLayer``, which the layer's method holds."""
    bound: BoundLayer = quant_method_of(layer_name).bound
    return bound(x, topk_weights, topk_ids, expert_map)


def fused_moe_fake(
    x: Tensor,
    topk_weights: Tensor,  # noqa: ARG001
    topk_ids: Tensor,  # noqa: ARG001
    expert_map: Tensor | None,  # noqa: ARG001
    layer_name: str,  # noqa: ARG001
) -> Tensor:
    """Shape and dtype of ``fused_moe``, for tracing."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def rows8_fake(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
) -> Tensor:
    """Shape and dtype of ``rows8``, for tracing."""
    # len() of a traced tensor would fix its size.
    return x.new_empty(x.shape[0], codes.shape[0])


def register_op() -> None:
    """Define ``torch.ops.resmoe.fused_moe`` and ``rows8`` for the platform's device; repeatable."""
    if not hasattr(torch.ops.resmoe, "rows8"):
        direct_register_custom_op("rows8", rows8, fake_impl=rows8_fake, target_lib=_LIBRARY)
    if not hasattr(torch.ops.resmoe, "fused_moe"):
        direct_register_custom_op("fused_moe", fused_moe, fake_impl=fused_moe_fake, target_lib=_LIBRARY)
