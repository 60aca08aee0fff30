"""The CPU's kernel. Two strategies, same result: C++, and torch for many tokens where that has native products.

The C++ kernel multiplies with AVX2. Processors that multiply bf16 or fp16 in hardware (AVX-512, AMX) are left to
torch once an expert meets enough tokens.
"""

from torch import Tensor

from resmoe_vllm.kernels.cpu import native, plain_torch
from resmoe_vllm.weights.layout import LayerLayout

# Above, where torch has native products, they win over reading each weight once for four tokens.
MAX_CPP_TOKENS = 64


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
    few = len(x) <= MAX_CPP_TOKENS or plain_torch.product_dtype(x.dtype) != x.dtype
    library = native.load() if few else None
    if library is None:
        return plain_torch.fused_moe(x, topk_weights, topk_ids, layout.bind(tensors), activation, expert_map)
    return native.fused_moe(library, x, topk_weights, topk_ids, tensors, layout, activation, expert_map)
