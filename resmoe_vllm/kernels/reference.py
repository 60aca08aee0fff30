"""The truth that kernels are tested against: restore each expert in fp32, then run it on its tokens."""

import torch
from torch import Tensor

from compress_tools.format.packing import unpack_mask
from compress_tools.format.schema import Projection
from resmoe_vllm.kernel_weights import (
    BitmapWeights,
    LowRankWeights,
    QuantizedWeights,
    ResMoEWeights,
    RowBitmapWeights,
    expert_scales,
)
from resmoe_vllm.kernels.activation import ACTIVATIONS
from resmoe_vllm.kernels.routing import local_ids


def decode_bitmap_ref(
    part: BitmapWeights | RowBitmapWeights, projection: Projection, expert: int, hidden_size: int
) -> Tensor:
    """One expert's residual, fp32 ``[I, H]``; each row is found by its own row pointer, or in a row of its own."""
    keep = unpack_mask(part.mask[projection][expert], hidden_size)
    if not keep.any():  # a rank may hold none of an expert's values
        return torch.zeros(keep.shape, device=keep.device)
    position = keep.cumsum(1) - 1
    if isinstance(part, BitmapWeights):
        position = position + part.row_ptr[projection][expert].long()[:, None]
        values = part.expert_values(expert).float()
        found = values[position.clamp(0, values.numel() - 1)]
    else:
        found = part.expert_values(projection, expert).float().gather(1, position.clamp(min=0))
    if part.value_bits is not None:
        found = found * expert_scales(part, projection, expert, hidden_size)
    return torch.where(keep, found, 0.0)


def restore_ref(weights: ResMoEWeights, projection: Projection, expert: int) -> Tensor:
    """Center + residual of one expert, fp32 ``[I, H]``."""
    terms = [weights.center[projection].to(torch.float32)] if projection in weights.center else []
    for part in weights.residual:
        if projection not in part.projections:
            continue
        if isinstance(part, LowRankWeights):
            terms.append(part.u[expert].to(torch.float32) @ part.v[projection][expert].to(torch.float32))
        elif isinstance(part, QuantizedWeights):
            terms.append(part.rows[projection][expert].to(torch.float32))
        else:
            terms.append(decode_bitmap_ref(part, projection, expert, weights.hidden_size))
    return torch.stack(terms).sum(0)


def fused_moe_ref(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    weights: ResMoEWeights,
    activation: str,
    expert_map: Tensor | None = None,
) -> Tensor:
    """Routed experts of one layer on one rank; all arithmetic in fp32, the result rounded once to x's dtype.

    Args:
        x: hidden states ``[T, H]``.
        topk_weights: router weights ``[T, K]``.
        topk_ids: global expert ids ``[T, K]``; negative ones are skipped.
        weights: the layer.
        activation: one of ``ACTIVATIONS``.
        expert_map: ``[E]`` global -> local expert, -1 elsewhere; None when all experts are here.
    Returns:
        ``[T, H]``, x's dtype, fresh.
    """
    ids = local_ids(topk_ids, expert_map)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in sorted(set(ids.flatten().tolist()) - {-1}):
        gate, up, down = (
            restore_ref(weights, projection, expert) for projection in ("gate_proj", "up_proj", "down_proj")
        )
        hidden = ACTIVATIONS[activation](x.float() @ gate.T) * (x.float() @ up.T)  # [T, I]
        share = (topk_weights.float() * (ids == expert)).sum(1, keepdim=True)  # [T, 1]
        out += share * (hidden @ down)
    return out.to(x.dtype)
