"""vLLM's own 4-bit weight-only MoE layer, Marlin, on random codes: what ours have to be held against at equal bytes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.harness.shapes import MoEShape

BITS, GROUP = 4, 128
# a Marlin tile has this many rows of the contraction
TILE = 16


def marlin_weights(shape: MoEShape, device: str, seed: int) -> dict[str, torch.Tensor]:
    """Random codes and scales of one layer, laid out as Marlin reads them; what they say does not matter for time."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = {"w1": (shape.hidden, 2 * shape.intermediate), "w2": (shape.intermediate, shape.hidden)}
    made: dict[str, torch.Tensor] = {}
    for name, (inner, outer) in sizes.items():
        codes = (shape.experts, inner // TILE, outer * BITS // 2)
        made[name] = torch.randint(
            -(2**31), 2**31 - 1, codes, generator=generator, device=device, dtype=torch.int64
        ).int()
        scales = torch.rand(shape.experts, inner // GROUP, outer, generator=generator, device=device)
        made[f"{name}_scale"] = (scales * inner**-0.5 / 8).bfloat16()
    return made


def marlin_bytes(weights: dict[str, torch.Tensor], experts: float) -> float:
    """What is read where ``experts`` are hit."""
    return sum(tensor[0].nbytes for tensor in weights.values()) * experts


def marlin_call(weights: dict[str, torch.Tensor]) -> Callable[..., Any] | None:
    """(x, topk_weights, topk_ids) to the layer's output; None where vLLM, or this kernel of it, is not there."""
    try:
        from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
        from vllm.scalar_type import scalar_types
    except ImportError:
        return None
    fixed = {name: weights[name] for name in ("w1", "w2", "w1_scale", "w2_scale")}
    call = partial(fused_marlin_moe, **fixed, bias1=None, bias2=None, quant_type_id=scalar_types.uint4b8.id)
    return lambda x, topk_weights, topk_ids: call(hidden_states=x, topk_weights=topk_weights, topk_ids=topk_ids)
