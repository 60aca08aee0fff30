"""Random routing, every expert as likely."""

import torch
from torch import Tensor

from benchmarks.harness.shapes import MoEShape


def route(shape: MoEShape, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Fresh (topk_weights fp32 [T, K], topk_ids int32 [T, K]) on the generator's device."""
    scores, ids = torch.rand(tokens, shape.experts, generator=generator, device=generator.device).topk(shape.top_k)
    return scores / scores.sum(1, keepdim=True), ids.int()
