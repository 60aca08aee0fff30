"""StepFun's Step-3.5 and 3.7: gate, up and down in a 3-D tensor each; the last layers clamp their activation."""

from compress_tools.architectures.base import MoEArchitecture
from compress_tools.architectures.layouts import OneByOne, Stacked

EXPERT = "layers.{layer}.moe.experts.{expert}"

STEP3P5 = MoEArchitecture(
    model_type="step3p5",
    title="Step-3.5",
    aliases=("step3p7",),
    models=("Step-3.5-Flash (bf16, fp8)", "Step-3.7-Flash (bf16, fp8)"),
    expert=EXPERT,
    layouts=(
        Stacked("layers.{layer}.moe", ("gate_proj.weight", "up_proj.weight"), "down_proj.weight"),
        Stacked(),
        OneByOne(EXPERT),
    ),
    num_experts_keys=("moe_num_experts", "n_routed_experts", "num_local_experts"),
    intermediate_size_keys=("moe_intermediate_size",),
    vllm_cpu=False,
    runs_in="it can't route sigmoid scores without groups, plain checkpoints included; run in transformers",
)
