"""Gemma 4: experts beside a dense MLP in every layer, stacked in 3-D tensors; embeddings are tied."""

from compress_tools.architectures.base import MoEArchitecture
from compress_tools.architectures.layouts import OneByOne, Stacked

EXPERT = "layers.{layer}.experts.{expert}"

GEMMA4 = MoEArchitecture(
    model_type="gemma4",
    title="Gemma 4",
    models=("gemma-4-26B-A4B (bf16)",),
    aliases=("gemma4_text",),
    expert=EXPERT,
    layouts=(Stacked("layers.{layer}.experts"), OneByOne(EXPERT)),
    intermediate_size_keys=("moe_intermediate_size",),
    tied=True,
)
