"""DeepSeekMoE (the 16B layout), DeepSeek-V2, V3, and what shares it: shared experts, dense first layers."""

from compress_tools.architectures.base import MoEArchitecture

DEEPSEEK_MOE = MoEArchitecture(
    model_type="deepseek", title="DeepSeekMoE", intermediate_size_keys=("moe_intermediate_size",)
)
DEEPSEEK_V2 = MoEArchitecture(
    model_type="deepseek_v2", title="DeepSeek-V2", intermediate_size_keys=("moe_intermediate_size",)
)
DEEPSEEK_V3 = MoEArchitecture(
    model_type="deepseek_v3",
    title="DeepSeek-V3",
    aliases=("kimi_k2",),
    models=("DeepSeek-V3", "DeepSeek-R1", "DeepSeek-V3.1", "Kimi-K2", "Moonlight-16B-A3B"),
    intermediate_size_keys=("moe_intermediate_size",),
)
DEEPSEEK_V32 = MoEArchitecture(
    model_type="deepseek_v32",
    title="DeepSeek-V3.2",
    models=("DeepSeek-V3.2",),
    intermediate_size_keys=("moe_intermediate_size",),
    vllm_cpu=False,
    runs_in="it has no sparse attention; run in transformers",
)
DOTS1 = MoEArchitecture(
    model_type="dots1",
    title="dots.llm1",
    intermediate_size_keys=("moe_intermediate_size",),
)
