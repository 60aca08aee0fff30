"""Llama-4: one routed expert for each token, its weight on the input; a shared expert; dense layers between."""

from compress_tools.architectures.base import MoEArchitecture
from compress_tools.architectures.layouts import OneByOne, Stacked

EXPERT = "layers.{layer}.feed_forward.experts.{expert}"

LLAMA4 = MoEArchitecture(
    model_type="llama4",
    title="Llama-4",
    aliases=("llama4_text",),
    models=("Llama-4-Scout-17B-16E (bf16)", "Llama-4-Maverick-17B-128E (bf16, fp8)"),
    expert=EXPERT,
    # Inputs first.
    layouts=(Stacked("layers.{layer}.feed_forward.experts", transposed=True), OneByOne(EXPERT)),
    intermediate_size_keys=("intermediate_size",),
    # vLLM orders rows of q and k anew as it loads what is called weight, and renames the output layer by its name.
    exact_rest=("q_proj", "k_proj", "v_proj", "lm_head"),
    vllm_cpu=False,
    runs_in="its module imports torchvision, of which there is no build beside that torch; run in transformers",
)
