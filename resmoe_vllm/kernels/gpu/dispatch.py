"""The GPU's kernels: Triton for every coder (layer.py)."""

from torch import Tensor

from resmoe_vllm.weights.layout import LayerLayout


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
    from resmoe_vllm.kernels.gpu import layer

    return layer.fused_moe(x, topk_weights, topk_ids, tensors, layout, activation, expert_map)
