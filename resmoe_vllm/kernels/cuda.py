"""The GPU's kernels: Triton for every coder (triton_moe.py)."""

from torch import Tensor

from resmoe_vllm.layout import LayerLayout


def fused_moe(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    tensors: list[Tensor],
    layout: LayerLayout,
    activation: str,
    expert_map: Tensor | None = None,
) -> Tensor:
    """See ``fused_moe_ref``."""
    # here: a machine without a GPU need not have Triton
    from resmoe_vllm.kernels import triton_moe

    return triton_moe.fused_moe(x, topk_weights, topk_ids, tensors, layout, activation, expert_map)
