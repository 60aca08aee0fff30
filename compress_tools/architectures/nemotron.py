"""Nemotron-3: Mamba2, attention and experts, each a layer of its own; two-matrix experts, in a latent space or not."""

from compress_tools.architectures.base import MoEArchitecture
from compress_tools.architectures.layouts import OneByOne, Stacked
from compress_tools.format.schema import Projection

EXPERT = "layers.{layer}.mixer.experts.{expert}"
TWO_MATRICES: dict[Projection, str] = {"up_proj": "up_proj", "down_proj": "down_proj"}

NEMOTRON_H = MoEArchitecture(
    model_type="nemotron_h",
    title="Nemotron-3",
    models=("Nemotron-3-Nano, -Super and -Ultra (bf16, fp8, nvfp4)",),
    expert=EXPERT,
    projections=tuple(TWO_MATRICES.items()),
    layouts=(
        OneByOne(EXPERT, TWO_MATRICES),
        Stacked("layers.{layer}.mixer.experts", gate_up=("up_proj",), gated=False),
    ),
    renames=((r"^model\.", "backbone."),),
    num_experts_keys=("n_routed_experts",),
    intermediate_size_keys=("moe_intermediate_size",),
    # Super and Ultra project to a smaller space before their experts; Nano's entry is null.
    hidden_size_keys=("moe_latent_size", "hidden_size"),
    own_output=True,
    vllm_cpu=False,
    runs_in="it refuses experts without a gate there, plain checkpoints included; run in transformers, and in vLLM by "
    "a test that lifts this check",
)
