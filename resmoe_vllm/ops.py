"""The custom op ``torch.ops.resmoe.fused_moe`` and the one table of kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from compress_tools.errors import KernelUnsupportedError
from compress_tools.format.schema import (
    BitmapResidual,
    LowRankResidual,
    QuantizedCenter,
    QuantizedResidual,
    RowBitmapResidual,
)
from resmoe_vllm.compat import direct_register_custom_op
from resmoe_vllm.kernels.activation import ACTIVATIONS
from resmoe_vllm.kernels.cpu import dispatch as cpu
from resmoe_vllm.kernels.gpu import dispatch as gpu
from resmoe_vllm.weights.layout import LayerLayout, parse_layout

# (x [T, H], topk_weights [T, K], topk_ids [T, K], tensors, layout, activation, expert_map [E] or None) -> [T, H]
Kernel = Callable[[Tensor, Tensor, Tensor, list[Tensor], LayerLayout, str, Tensor | None], Tensor]

# The parts that the kernels read, in each of their forms.
CODERS = frozenset(
    coder
    for part in (BitmapResidual, RowBitmapResidual, LowRankResidual, QuantizedResidual, QuantizedCenter)
    for coder in part.kernel_coders
)


@dataclass(frozen=True)
class KernelRow:
    """One row of the kernel table.

    Attributes:
        kernel: runs layers whose coders are all among ``coders``.
        coders: a subset of ``CODERS``.
        dtypes: of x and of weights in the model's dtype.
        device: device type.
    """

    kernel: Kernel
    coders: frozenset[str]
    dtypes: tuple[torch.dtype, ...]
    device: str


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The first row that fits is taken.
KERNELS = (
    KernelRow(cpu.fused_moe, CODERS, _FLOATS, "cpu"),
    KernelRow(gpu.fused_moe, CODERS, _FLOATS, "cuda"),
)

# the library's life is the op's
_LIBRARY = torch.library.Library("resmoe", "FRAGMENT")


@cache
def select_kernel(coders: frozenset[str], dtype: torch.dtype, device: str) -> Kernel:
    """Kernel for a layer.

    Args:
        coders: ``LayerLayout.coders``.
        dtype: of x and weights.
        device: device type.
    Raises:
        KernelUnsupportedError: there is none; lists what there is.
    """
    for row in KERNELS:
        if coders <= row.coders and dtype in row.dtypes and device == row.device:
            return row.kernel
    known = [f"{'+'.join(sorted(row.coders))} on {row.device} in {_names(row.dtypes)}" for row in KERNELS]
    raise KernelUnsupportedError(
        f"resmoe has no kernel for {'+'.join(sorted(coders))} in {_names((dtype,))} on {device}; "
        f"it has: {'; '.join(known)}"
    )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_activation(activation: str) -> str:
    """The activation, if kernels have it.

    Raises:
        KernelUnsupportedError: they don't.
    """
    if activation not in ACTIVATIONS:
        raise KernelUnsupportedError(
            f"resmoe has no activation {activation!r}; it has: {', '.join(sorted(ACTIVATIONS))}"
        )
    return activation


def fused_moe(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    tensors: list[Tensor],
    layout: str,
    activation: str,
) -> Tensor:
    """Routed experts of one layer on one rank.

    Args:
        x: hidden states ``[T, H]``; fp32, bf16 or fp16.
        topk_weights: router weights ``[T, K]``, fp32.
        topk_ids: global expert ids ``[T, K]``; negative ones are skipped.
        expert_map: ``[E]`` global -> local expert, -1 elsewhere; None when all experts are here.
        tensors: the layer's parameters in the order of ``parse_layout(layout).params``.
        layout: ``LayerLayout.key``.
        activation: see ``check_activation``.
    Returns:
        ``[T, H]``, x's dtype, fresh; the partial sum of this rank.
    """
    parsed = parse_layout(layout)
    kernel = select_kernel(parsed.coders, x.dtype, x.device.type)
    return kernel(x, topk_weights, topk_ids, tensors, parsed, activation, expert_map)


def fused_moe_fake(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    tensors: list[Tensor],
    layout: str,
    activation: str,
) -> Tensor:
    """Shape and dtype of ``fused_moe``, for tracing."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def register_op() -> None:
    """Define ``torch.ops.resmoe.fused_moe`` for the platform's device; repeatable."""
    if not hasattr(torch.ops.resmoe, "fused_moe"):
        direct_register_custom_op("fused_moe", fused_moe, fake_impl=fused_moe_fake, target_lib=_LIBRARY)
