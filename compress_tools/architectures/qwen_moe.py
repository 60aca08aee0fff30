"""Qwen2-MoE (with a shared expert) and Qwen3-MoE; dense layers may stand between."""

from compress_tools.architectures.base import MoEArchitecture

QWEN2_MOE = MoEArchitecture(
    model_type="qwen2_moe", title="Qwen2-MoE", intermediate_size_keys=("moe_intermediate_size",)
)
QWEN3_MOE = MoEArchitecture(
    model_type="qwen3_moe", title="Qwen3-MoE", intermediate_size_keys=("moe_intermediate_size",)
)
