"""Poolside's Laguna: a correction bias lies among the experts' names, and is none of them."""

from compress_tools.architectures.base import MoEArchitecture

LAGUNA = MoEArchitecture(
    model_type="laguna",
    title="Laguna",
    models=("Laguna-XS (bf16, fp8)", "Laguna-S (bf16, fp8)", "Laguna-M (bf16, fp8)"),
    intermediate_size_keys=("moe_intermediate_size",),
    vllm_cpu=False,
    runs_in="it can't route sigmoid scores without groups, plain checkpoints included; run in transformers",
    renames=(
        (r"\.mlp\.gate\.e_score_correction_bias$", ".mlp.experts.e_score_correction_bias"),
        (r"\.mlp\.shared_experts\.", ".mlp.shared_expert."),
    ),
)
