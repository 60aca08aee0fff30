"""Qwen's families: with and without a shared expert, dense layers between, hybrid attention, vision beside them."""

from compress_tools.architectures.base import MoEArchitecture
from compress_tools.architectures.layouts import OneByOne, Stacked

QWEN2_MOE = MoEArchitecture(
    model_type="qwen2_moe",
    title="Qwen2-MoE",
    models=("Qwen1.5-MoE-A2.7B (bf16)", "Qwen2-57B-A14B (bf16)"),
    intermediate_size_keys=("moe_intermediate_size",),
)
QWEN3_MOE = MoEArchitecture(
    model_type="qwen3_moe",
    title="Qwen3-MoE",
    models=(
        "Qwen3-30B-A3B (bf16, fp8)",
        "Qwen3-235B-A22B (bf16, fp8)",
        "Qwen3-Coder-480B-A35B (bf16, fp8)",
        "Intern-S1 (bf16, fp8)",
    ),
    intermediate_size_keys=("moe_intermediate_size",),
)

QWEN3_NEXT = MoEArchitecture(
    model_type="qwen3_next",
    title="Qwen3-Next",
    models=("Qwen3-Next-80B-A3B (bf16, fp8)", "Qwen3-Coder-Next (bf16, fp8)"),
    intermediate_size_keys=("moe_intermediate_size",),
    own_output=True,
)
QWEN3_5_MOE = MoEArchitecture(
    model_type="qwen3_5_moe",
    title="Qwen3.5-MoE",
    models=("Qwen3.5-35B-A3B (bf16, fp8)", "Qwen3.6-35B-A3B (bf16, fp8)"),
    layouts=(Stacked(), OneByOne()),
    aliases=("qwen3_5_moe_text",),
    intermediate_size_keys=("moe_intermediate_size",),
    vllm_cpu=False,
    runs_in="its module imports torchvision, of which there is no build beside that torch; run in transformers",
)
QWEN3_VL_MOE = MoEArchitecture(
    model_type="qwen3_vl_moe",
    title="Qwen3-VL-MoE",
    aliases=("qwen3_vl_moe_text",),
    models=("Qwen3-VL-30B-A3B (bf16, fp8)", "Qwen3-VL-235B-A22B (bf16, fp8)"),
    # Published inputs first; transformers 5 writes them outputs first. Where H = 2I gate_up's shape is the same in
    # both, but down's is not: H and I differ then. Both tensors have to fit.
    layouts=(Stacked(transposed=True), Stacked(), OneByOne()),
    intermediate_size_keys=("moe_intermediate_size",),
    vllm_cpu=False,
    runs_in="its module imports torchvision, of which there is no build beside that torch; run in transformers",
)
QWEN3_OMNI_MOE = MoEArchitecture(
    model_type="qwen3_omni_moe",
    title="Qwen3-Omni-MoE (thinker)",
    aliases=("qwen3_omni_moe_thinker", "qwen3_omni_moe_text"),
    models=("Qwen3-Omni-30B-A3B (bf16)",),
    intermediate_size_keys=("moe_intermediate_size",),
    vllm_cpu=False,
    runs_in="its module imports torchvision, of which there is no build beside that torch; run in transformers",
)
