"""GLM-4-MoE (GLM-4.5): shared experts, dense first layers."""

from compress_tools.architectures.base import MoEArchitecture

GLM4_MOE = MoEArchitecture(
    model_type="glm4_moe",
    title="GLM-4-MoE",
    models=("GLM-4.5 (bf16, fp8)", "GLM-4.5-Air (bf16, fp8)", "GLM-4.6 (bf16, fp8)", "GLM-4.7 (bf16, fp8)"),
    intermediate_size_keys=("moe_intermediate_size",),
    own_output=True,
)
GLM4_MOE_LITE = MoEArchitecture(
    model_type="glm4_moe_lite",
    title="GLM-4.7-Flash",
    models=("GLM-4.7-Flash (bf16)",),
    intermediate_size_keys=("moe_intermediate_size",),
    own_output=True,
)
GLM_MOE_DSA = MoEArchitecture(
    model_type="glm_moe_dsa",
    title="GLM-5",
    models=("GLM-5 (bf16, fp8)", "GLM-5.1 (bf16, fp8)", "GLM-5.2 (bf16, fp8)"),
    intermediate_size_keys=("moe_intermediate_size",),
    own_output=True,
    vllm_cpu=False,
    runs_in="it has no sparse attention; run in transformers",
)
GLM4V_MOE = MoEArchitecture(
    model_type="glm4v_moe",
    title="GLM-4.5V",
    aliases=("glm4v_moe_text",),
    models=("GLM-4.5V (bf16, fp8)", "GLM-4.6V (bf16, fp8)"),
    intermediate_size_keys=("moe_intermediate_size",),
    vllm_cpu=False,
    runs_in="its module imports torchvision, of which there is no build beside that torch; run in transformers",
)
GLM5_NEXT = MoEArchitecture(
    model_type="glm5_next",
    title="GLM-5.3-Flash",
    aliases=("glm5_next_text",),
    models=("GLM-5.3-Flash (fp8)",),
    intermediate_size_keys=("moe_intermediate_size",),
    renames=(
        (r"\.self_attn\.forget_gate\.", ".self_attn."),
        (r"\.(attn|ffn)_hc\.(fn|base|scale)$", r".hc_\1_\2"),
    ),
    vllm_cpu=False,
    runs_in="its module imports torchvision, of which there is no build beside that torch; run in transformers",
)
