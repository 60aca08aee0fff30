"""DeepSeekMoE (the 16B layout), DeepSeek-V2, V3, and what shares it: shared experts, dense first layers."""

from compress_tools.architectures.base import MIXTRAL_PROJECTIONS, MoEArchitecture
from compress_tools.architectures.layouts import OneByOne

V4_EXPERT = "layers.{layer}.ffn.experts.{expert}"

DEEPSEEK_MOE = MoEArchitecture(
    model_type="deepseek",
    title="DeepSeekMoE",
    models=("deepseek-moe-16b (bf16)",),
    intermediate_size_keys=("moe_intermediate_size",),
    own_output=True,
)
DEEPSEEK_V2 = MoEArchitecture(
    model_type="deepseek_v2",
    title="DeepSeek-V2",
    models=("DeepSeek-V2 (bf16)", "DeepSeek-V2-Lite (bf16)", "DeepSeek-Coder-V2 (bf16)"),
    intermediate_size_keys=("moe_intermediate_size",),
    own_output=True,
)
DEEPSEEK_V3 = MoEArchitecture(
    model_type="deepseek_v3",
    title="DeepSeek-V3",
    models=(
        "DeepSeek-V3 (fp8)",
        "DeepSeek-R1 (fp8)",
        "DeepSeek-V3.1 (fp8)",
        "Kimi-K2-Instruct (fp8)",
        "Kimi-K2-Thinking (int4)",
        "Moonlight-16B-A3B (bf16)",
    ),
    aliases=("kimi_k2",),
    intermediate_size_keys=("moe_intermediate_size",),
    own_output=True,
)
DEEPSEEK_V32 = MoEArchitecture(
    model_type="deepseek_v32",
    title="DeepSeek-V3.2",
    models=("DeepSeek-V3.2 (fp8)",),
    intermediate_size_keys=("moe_intermediate_size",),
    own_output=True,
    vllm_cpu=False,
    runs_in="it has no sparse attention; run in transformers",
)
DEEPSEEK_V4 = MoEArchitecture(
    model_type="deepseek_v4",
    title="DeepSeek-V4",
    models=("DeepSeek-V4-Flash (fp4, fp8)", "DeepSeek-V4-Pro (fp4, fp8)"),
    expert=V4_EXPERT,
    projections=MIXTRAL_PROJECTIONS,
    layouts=(OneByOne(V4_EXPERT, dict(MIXTRAL_PROJECTIONS)),),
    own_output=True,
    intermediate_size_keys=("moe_intermediate_size",),
    vllm_cpu=False,
    runs_in="its sparse attention calls a Triton kernel; run in transformers",
)
DOTS1 = MoEArchitecture(
    model_type="dots1",
    title="dots.llm1",
    models=("dots.llm1 (bf16)",),
    intermediate_size_keys=("moe_intermediate_size",),
)
AXK1 = MoEArchitecture(
    model_type="axk1",
    title="A.X-K1",
    models=("A.X-K1 (bf16)",),
    intermediate_size_keys=("moe_intermediate_size",),
    own_output=True,
    renames=((r"\.mlp\.post_mlp_layernorm\.", ".post_mlp_layernorm."),),
)
