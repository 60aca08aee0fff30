"""The fused layer in plain torch calls, for every coder: center once per token, residuals per routed expert.

gate and up: ``[gate_c; up_c] x`` once per token, each chosen expert adds its residual's product, before the
activation.
down: ``sum_k g_k (down_c + D_k) a_k = down_c (sum_k g_k a_k) + sum_k g_k D_k a_k``; it is linear, so the
center's product is taken once, of the weighted sum. Products are in the weights' dtype where the processor
multiplies it, which torch accumulates in fp32, and in fp32 elsewhere: a processor without bf16 or fp16
products takes ten times as long for them. Sums, activation, biases and router weights are fp32. What is not low rank is
decoded and added up for one expert and projection at a time, multiplied as a dense tile, and let go; a center in
codes is decoded for each call.
"""

import functools

import torch
from torch import Tensor

from compress_tools.format.packing import unpack_mask
from compress_tools.format.schema import Projection
from resmoe_vllm.kernels.activation import Activation
from resmoe_vllm.kernels.routing import tokens_by_expert
from resmoe_vllm.weights.bound import (
    BitmapWeights,
    LowRankWeights,
    QuantizedWeights,
    ResMoEWeights,
    RowBitmapWeights,
    expert_scales,
)

GATED: tuple[Projection, ...] = ("gate_proj", "up_proj")
UNGATED: tuple[Projection, ...] = ("up_proj",)


def decode_bitmap(
    part: BitmapWeights | RowBitmapWeights, projection: Projection, expert: int, hidden_size: int
) -> Tensor:
    """One expert's residual, dense ``[I, H]``: in the values' dtype, of codes in fp32."""
    keep = unpack_mask(part.mask[projection][expert], hidden_size)
    if isinstance(part, RowBitmapWeights):
        values = part.expert_values(projection, expert)
    else:
        values = part.expert_values(expert)[int(part.row_ptr[projection][expert, 0]) :]
    dense = torch.zeros(keep.shape, dtype=values.dtype).masked_scatter_(keep, values)
    return dense if part.value_bits is None else dense * expert_scales(part, projection, expert, hidden_size)


def decode_tile(weights: ResMoEWeights, projection: Projection, expert: int, dtype: torch.dtype) -> Tensor | None:
    """Sum of one expert's parts that are not low rank, ``[I, H]`` in ``dtype``; None where there are none."""
    tile: Tensor | None = None
    for part in weights.residual:
        if isinstance(part, LowRankWeights) or projection not in part.projections:
            continue
        if isinstance(part, QuantizedWeights):
            own = part.rows[projection][expert].to(torch.float32)
        else:
            own = decode_bitmap(part, projection, expert, weights.hidden_size)
        tile = own if tile is None else tile.float() + own
    return None if tile is None else tile.to(dtype)


@functools.cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products of ``dtype`` weights are taken in on this processor."""
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype if dtype not in native or native[dtype]() else torch.float32


def residual_product(x: Tensor, weights: ResMoEWeights, projection: Projection, expert: int) -> Tensor:
    """One expert's residual applied to its tokens.

    Args:
        x: ``[N, H]``, or ``[N, I]`` for down_proj; of the products' dtype.
        weights: the layer.
        projection: whose residual D ``[I, H]``.
        expert: local expert.
    Returns:
        fp32 ``x D^T [N, I]``; for down_proj ``x D [N, H]``.
    """
    is_down = projection == "down_proj"
    columns = weights.hidden_size if is_down else weights.intermediate_size
    total = torch.zeros(x.shape[0], columns, dtype=torch.float32)
    tile = decode_tile(weights, projection, expert, x.dtype)
    if tile is not None:
        total += x @ tile if is_down else x @ tile.T
    for part in weights.residual:
        if isinstance(part, LowRankWeights) and projection in part.projections:
            u, v = part.u[expert].to(x.dtype), part.v[projection][expert].to(x.dtype)
            total += (x @ u) @ v if is_down else (x @ v.T) @ u.T
    return total


def fused_moe(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    weights: ResMoEWeights,
    activation: Activation,
    expert_map: Tensor | None = None,
) -> Tensor:
    """See ``fused_moe_ref``; x on the CPU, of the weights' dtype."""
    dtype = product_dtype(x.dtype)
    out_dtype, x = x.dtype, x.to(dtype)
    center = {
        projection: x @ rows.to(dtype).T for projection, rows in weights.center.items() if projection != "down_proj"
    }  # [T, I]
    mixed = torch.zeros(x.shape[0], weights.intermediate_size, dtype=torch.float32)
    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert, tokens, router_weights in tokens_by_expert(topk_ids, topk_weights, expert_map):
        chosen = x[tokens]  # [N, H]
        inner: dict[Projection, Tensor] = {}
        for projection in GATED if activation.gated else UNGATED:
            inner[projection] = residual_product(chosen, weights, projection, expert)
            if projection in center:
                inner[projection] += center[projection][tokens]
            if projection in weights.biases:
                inner[projection] += weights.biases[projection][expert]
        hidden = activation(inner.get("gate_proj"), inner["up_proj"]) * router_weights[:, None]  # [N, I]
        mixed.index_add_(0, tokens, hidden)
        down = residual_product(hidden.to(dtype), weights, "down_proj", expert)
        if "down_proj" in weights.biases:
            down += router_weights[:, None] * weights.biases["down_proj"][expert]
        out.index_add_(0, tokens, down)
    if "down_proj" in weights.center:
        out += mixed.to(dtype) @ weights.center["down_proj"].to(dtype)
    return out.to(out_dtype)
