"""Sorts routed pairs by expert into blocks of equal length: vLLM's ``moe_align_block_size`` in one Triton launch.

Same contract (``ignore_invalid_experts=True``), so vLLM's own serves in its place where there is much to sort:
every program here reads all ids, which costs nothing beside a launch while they are few.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Pairs up to which one launch of this kernel is preferred to vLLM's; not yet measured.
MAX_PAIRS = 4096
# Rows of a block up to which there is little to sort.
FEW_ROWS = 16

Launch = Callable[..., object]


class Routing(NamedTuple):
    """Blocks of pairs as kernels take them (``reference.align_ref``).

    Attributes:
        block_experts: int32, the expert of each block; of a lone token ``topk_ids``, a block for each of its pairs.
        sorted_pairs: int32; None for a lone token, and so is the next.
        num_padded: int32 ``[1]``: slots of blocks that hold a pair.
        expert_map: of a lone token, for ``topk_ids``.
    """

    block_experts: Tensor
    sorted_pairs: Tensor | None = None
    num_padded: Tensor | None = None
    expert_map: Tensor | None = None


@triton.jit
def local_experts(topk_ids, expert_map, pairs, ok):
    """Local expert of each pair, int32; -1 for padding and other ranks' experts."""
    ids = tl.load(topk_ids + pairs, mask=ok, other=-1).to(tl.int32)
    if expert_map is not None:
        ids = tl.load(expert_map + ids, mask=ids >= 0, other=-1).to(tl.int32)
    return tl.where(ids < 0, -1, ids)


@triton.jit
def block_expert(r, m_block, BLOCK_M: tl.constexpr):
    """Local expert of a block, int32; -1 where it has no pair of this rank."""
    if r.sorted_pairs is None:
        expert = local_experts(r.block_experts, r.expert_map, m_block, m_block >= 0)
    else:
        # both on their way at once: behind num_padded there is memory, if nothing that was written
        expert = tl.load(r.block_experts + m_block)
        expert = tl.where(m_block * BLOCK_M < tl.load(r.num_padded), expert, -1)
    return expert


@triton.jit
def block_pairs(r, m_block, num_pairs, BLOCK_M: tl.constexpr):
    """Pairs of a block, int32 ``[BLOCK_M]``; ``num_pairs`` where there is none."""
    slots = tl.arange(0, BLOCK_M)
    if r.sorted_pairs is None:
        pairs = tl.where(slots == 0, m_block, num_pairs)
    else:
        pairs = tl.load(r.sorted_pairs + m_block * BLOCK_M + slots)
    return pairs


@triton.jit(do_not_specialize=["num_pairs"])
def _align_kernel(
    topk_ids, expert_map, sorted_pairs, block_experts, num_padded, num_pairs, NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """One program per expert: it counts all, so it knows where its own blocks begin, and places its pairs there."""
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for begin in range(0, num_pairs, CHUNK):
        pairs = begin + tl.arange(0, CHUNK)
        ids = local_experts(topk_ids, expert_map, pairs, pairs < num_pairs)
        counts += tl.histogram(tl.where(ids < 0, BINS - 1, ids), BINS)
    counts = tl.where(bins < NUM_EXPERTS, counts, 0)
    padded = (counts + BLOCK - 1) // BLOCK * BLOCK
    first = tl.sum(tl.where(bins < expert, padded, 0), 0)
    length = tl.sum(tl.where(bins == expert, padded, 0), 0)
    count = tl.sum(tl.where(bins == expert, counts, 0), 0)
    if expert == 0:
        tl.store(num_padded, tl.sum(padded, 0))
    for block in range(first // BLOCK, (first + length) // BLOCK):
        tl.store(block_experts + block, expert)
    tail = count + tl.arange(0, BLOCK)
    tl.store(sorted_pairs + first + tail, num_pairs, mask=tail < length)
    placed = first
    for begin in range(0, num_pairs, CHUNK):
        pairs = begin + tl.arange(0, CHUNK)
        own = (local_experts(topk_ids, expert_map, pairs, pairs < num_pairs) == expert).to(tl.int32)
        tl.store(sorted_pairs + placed + tl.cumsum(own, 0) - 1, pairs, mask=own != 0)
        placed += tl.sum(own, 0)


def max_blocks(num_pairs: int, block: int, num_experts: int) -> int:
    """Most blocks that any routing needs."""
    return min(num_pairs, (num_pairs + num_experts * (block - 1)) // block)


def align(
    topk_ids: Tensor, block: int, num_experts: int, expert_map: Tensor | None, launch: Launch | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.align_ref``; entries behind ``num_padded`` are not written.

    Args:
        topk_ids: ``[T, K]``, contiguous, T*K at least 1.
        block: pairs of a block, a power of two.
        num_experts: local ones.
        expert_map: int32 ``[E]`` global -> local, or None.
        launch: of ``_align_kernel`` from its grid, arguments and options; None for Triton's own.
    """
    num_pairs = topk_ids.numel()
    if num_pairs > MAX_PAIRS and hasattr(torch.ops._moe_C, "moe_align_block_size"):
        from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

        # vLLM counts global experts
        counted = num_experts if expert_map is None else len(expert_map)
        aligned: tuple[Tensor, Tensor, Tensor] = moe_align_block_size(
            topk_ids, block, counted, expert_map, ignore_invalid_experts=True
        )
        return aligned
    blocks = max_blocks(num_pairs, block, num_experts)
    sorted_pairs = torch.empty(blocks * block, dtype=torch.int32, device=topk_ids.device)
    block_experts = torch.empty(blocks, dtype=torch.int32, device=topk_ids.device)
    num_padded = torch.empty(1, dtype=torch.int32, device=topk_ids.device)
    # The block tells the class of T, and so how much there may be to sort.
    arguments = (num_experts, max(16, 1 << num_experts.bit_length()), block, min(2048, 32 * block))
    pointers = topk_ids, expert_map, sorted_pairs, block_experts, num_padded
    (launch or _launch)(
        _align_kernel, (num_experts, 1, 1), *pointers, num_pairs, *arguments, num_warps=4 if block <= FEW_ROWS else 8
    )
    return sorted_pairs, block_experts, num_padded


def _launch(kernel: Any, grid: tuple[int, int, int], *arguments: object, **options: int) -> None:
    kernel[grid](*arguments, **options)
