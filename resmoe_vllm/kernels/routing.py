"""Which tokens go to which local expert."""

from collections.abc import Iterator

import torch
from torch import Tensor


def local_ids(topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """Global expert ids ``[T, K]`` to local ones, int64; -1 for padding and for experts of other ranks."""
    ids = topk_ids.long()
    if expert_map is None:
        return ids.clamp(min=-1)
    return torch.where(ids < 0, -1, expert_map.long()[ids.clamp(min=0)])


def tokens_by_expert(
    topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Local experts that have tokens, ascending.

    Yields:
        expert, its token indices int64 ``[N]``, their router weights fp32 ``[N]``.
    """
    ids, order = local_ids(topk_ids, expert_map).flatten().sort(stable=True)
    experts, counts = ids.unique_consecutive(return_counts=True)
    tokens = (order // topk_ids.shape[1]).split(counts.tolist())
    weights = topk_weights.flatten().float()[order].split(counts.tolist())
    for expert, token, weight in zip(experts.tolist(), tokens, weights, strict=True):
        if expert >= 0:
            yield expert, token, weight
