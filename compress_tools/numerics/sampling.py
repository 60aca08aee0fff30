"""Some of many, the same for the same seed."""

import torch
from torch import Tensor


def spaced(items: list[int], count: int) -> list[int]:
    """At most ``count`` of the items, evenly spaced with both ends; the middle one for 1."""
    if count == 1:
        return [items[len(items) // 2]]
    count = min(count, len(items))
    return [items[round(place * (len(items) - 1) / max(count - 1, 1))] for place in range(count)]


def choose(total: int, count: int, seed: int) -> Tensor:
    """``count`` of ``total`` numbers, ascending int64; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[:count].sort().values
