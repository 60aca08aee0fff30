"""Moonshot's Kimi-K2.5 (DeepSeek-V3's layers in a multimodal model) and Kimi-Linear (linear attention beside MLA)."""

from compress_tools.architectures.base import MIXTRAL_PROJECTIONS, MoEArchitecture
from compress_tools.architectures.layouts import OneByOne, Stacked

EXPERT = "layers.{layer}.block_sparse_moe.experts.{expert}"

KIMI_K25 = MoEArchitecture(
    model_type="kimi_k25",
    title="Kimi-K2.5",
    models=("Kimi-K2.5 (int4)", "Kimi-K2.6 (int4)", "Kimi-K2.7-Code (int4)"),
    intermediate_size_keys=("moe_intermediate_size",),
    vllm_cpu=False,
    runs_in="untried, since it starts with the published model's own image processor; run in transformers",
)
KIMI_LINEAR = MoEArchitecture(
    model_type="kimi_linear",
    title="Kimi-Linear",
    models=("Kimi-Linear-48B-A3B (bf16)",),
    expert=EXPERT,
    projections=MIXTRAL_PROJECTIONS,
    layouts=(OneByOne(EXPERT, dict(MIXTRAL_PROJECTIONS)), Stacked()),
    intermediate_size_keys=("moe_intermediate_size",),
    own_output=True,
    renames=(
        (r"\.self_attn\.forget_gate\.", ".self_attn."),
        (r"\.mlp\.(gate\.|shared_experts\.)", r".block_sparse_moe.\1"),
    ),
    vllm_cpu=False,
    runs_in="its linear attention has kernels for GPUs alone; run in transformers",
)
