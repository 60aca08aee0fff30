"""The CPU's two strategies, same result: the C++ kernel for few tokens, torch's matrix products for many."""

from torch import Tensor

from resmoe_vllm.kernels import cpp_cpu, torch_cpu
from resmoe_vllm.layout import LayerLayout

# Above, an expert meets enough tokens that a blocked matrix product wins over reading each weight once per token.
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
    library = cpp_cpu.load() if len(x) <= MAX_CPP_TOKENS else None
    if library is None:
        return torch_cpu.fused_moe(x, topk_weights, topk_ids, layout.bind(tensors), activation, expert_map)
    return cpp_cpu.fused_moe(library, x, topk_weights, topk_ids, tensors, layout, activation, expert_map)
