"""The truth that kernels are tested against: restore each expert in fp32, then run it on its tokens."""

import torch
from torch import Tensor

from compress_tools.format.packing import unpack_mask
from compress_tools.format.schema import Projection
from resmoe_vllm.kernels.activation import Activation
from resmoe_vllm.kernels.routing import local_ids
from resmoe_vllm.weights.bound import (
    BitmapWeights,
    LowRankWeights,
    QuantizedWeights,
    ResMoEWeights,
    RowBitmapWeights,
    expert_scales,
)


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


def gate_up_ref(x: Tensor, weights: ResMoEWeights, expert: int, activation: Activation) -> Tensor:
    """One expert's gate and up, with biases, and the activation: fp32 ``[T, H]`` to ``[T, I]``."""

    def product(projection: Projection) -> Tensor:
        out = x @ restore_ref(weights, projection, expert).T
        return out + weights.biases[projection][expert].float() if projection in weights.biases else out

    return activation(product("gate_proj") if activation.gated else None, product("up_proj"))


def align_ref(topk_ids: Tensor, block: int, num_experts: int, expert_map: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Routed pairs sorted by expert, each expert's padded to whole blocks: vLLM's ``moe_align_block_size``.

    Args:
        topk_ids: global expert ids ``[T, K]``; negative ones and other ranks' are left out.
        block: pairs of a block.
        num_experts: local ones.
        expert_map: ``[E]`` global -> local, -1 elsewhere; None when all experts are here.
    Returns:
        pairs ``token * K + choice``, int32, ``T * K`` where a block is padded; each block's local expert, int32;
        length of the pairs.
    """
    ids = local_ids(topk_ids, expert_map).flatten()
    pairs: list[int] = []
    experts: list[int] = []
    for expert in range(num_experts):
        own = (ids == expert).nonzero().flatten().tolist()
        blocks = -(-len(own) // block)
        pairs += own + [ids.numel()] * (blocks * block - len(own))
        experts += [expert] * blocks
    return torch.tensor(pairs, dtype=torch.int32), torch.tensor(experts, dtype=torch.int32), len(pairs)


def products_ref(a: Tensor, rows: Tensor, ids: Tensor | None, *, transposed: bool) -> Tensor:
    """Each row times its expert's weight, fp32.

    Args:
        a: ``[P, k]``.
        rows: ``[E, n, k]`` if transposed, else ``[E, k, n]``.
        ids: local expert of each row ``[P]``, NaN where it is negative; None: expert 0 for all.
        transposed: see ``rows``.
    Returns:
        ``[P, n]``.
    """
    weight = rows.float().mT if transposed else rows.float()
    if ids is None:
        return a.float() @ weight[0]
    found = torch.stack([row.float() @ weight[expert] for row, expert in zip(a, ids.tolist(), strict=True)])
    return found.masked_fill((ids < 0)[:, None], float("nan"))


def hidden_ref(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    weights: ResMoEWeights,
    activation: Activation,
    expert_map: Tensor | None = None,
) -> Tensor:
    """``weight * activation`` of each routed pair, fp32 ``[T*K, I]``; NaN for pairs that are skipped."""
    ids = local_ids(topk_ids, expert_map).flatten()
    tokens = x.float().repeat_interleave(topk_ids.shape[1], 0)
    hidden = torch.full((len(ids), weights.intermediate_size), float("nan"))
    for expert in sorted(set(ids.tolist()) - {-1}):
        own = ids == expert
        hidden[own] = gate_up_ref(tokens[own], weights, expert, activation) * topk_weights.float().flatten()[own, None]
    return hidden


def combine_ref(
    pairs: Tensor, tokens: Tensor | None, topk_ids: Tensor, expert_map: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Slabs of pairs ``[S, T*K, N]``, where their expert is here, and of tokens ``[S, T, N]``: the sum ``[T, N]``."""
    here = (local_ids(topk_ids, expert_map) >= 0).flatten()[:, None]
    total: Tensor = torch.where(here, pairs.float().sum(0), 0.0).unflatten(0, topk_ids.shape).sum(1)
    return (total if tokens is None else total + tokens.float().sum(0)).to(dtype)


def fused_moe_ref(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    weights: ResMoEWeights,
    activation: Activation,
    expert_map: Tensor | None = None,
) -> Tensor:
    """Routed experts of one layer on one rank; all arithmetic in fp32, the result rounded once to x's dtype.

    Args:
        x: hidden states ``[T, H]``.
        topk_weights: router weights ``[T, K]``.
        topk_ids: global expert ids ``[T, K]``; negative ones are skipped.
        weights: the layer.
        activation: the experts'.
        expert_map: ``[E]`` global -> local expert, -1 elsewhere; None when all experts are here.
    Returns:
        ``[T, H]``, x's dtype, fresh.
    """
    ids = local_ids(topk_ids, expert_map)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in sorted(set(ids.flatten().tolist()) - {-1}):
        hidden = gate_up_ref(x.float(), weights, expert, activation)  # [T, I]
        share = (topk_weights.float() * (ids == expert)).sum(1, keepdim=True)  # [T, 1]
        down = hidden @ restore_ref(weights, "down_proj", expert)
        if "down_proj" in weights.biases:
            down += weights.biases["down_proj"][expert].float()
        out += share * down
    return out.to(x.dtype)
