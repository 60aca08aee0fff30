"""Tencent's families: Hunyuan-A13B and Hy3."""

from compress_tools.architectures.base import MoEArchitecture

HUNYUAN_V1_MOE = MoEArchitecture(model_type="hunyuan_v1_moe", title="Hunyuan-MoE", models=("Hunyuan-A13B (bf16, fp8)",))
HY_V3 = MoEArchitecture(
    model_type="hy_v3",
    title="Hy3",
    models=("Hy3 (bf16, fp8)",),
    intermediate_size_keys=("moe_intermediate_size",),
    renames=(
        (r"\.mlp\.e_score_correction_bias$", ".mlp.expert_bias"),
        (r"\.mlp\.gate\.", ".mlp.router.gate."),
        (r"\.mlp\.shared_experts\.", ".mlp.shared_mlp."),
    ),
)
