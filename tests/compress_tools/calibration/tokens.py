"""Windows of tokens that every tiny model knows."""

import torch
from torch import Tensor


def tokens(windows: int, length: int, seed: int = 0) -> Tensor:
    """Seeded, ``[windows, length]`` int64."""
    return torch.randint(3, 128, (windows, length), generator=torch.Generator().manual_seed(seed))
