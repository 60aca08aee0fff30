"""ERNIE 4.5 MoE: shared experts, router statistics beside the router."""

from compress_tools.architectures.base import MoEArchitecture

ERNIE4_5_MOE = MoEArchitecture(
    model_type="ernie4_5_moe",
    title="ERNIE 4.5 MoE",
    models=("ERNIE-4.5-21B-A3B (bf16)", "ERNIE-4.5-300B-A47B (bf16)"),
    num_experts_keys=("moe_num_experts",),
    intermediate_size_keys=("moe_intermediate_size",),
    renames=((r"\.mlp\.gate\.moe_statics\.", ".mlp.moe_statics."),),
)
