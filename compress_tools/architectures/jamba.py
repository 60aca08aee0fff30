"""Jamba: Mamba beside attention, experts in every other layer, ``feed_forward.experts``."""

from compress_tools.architectures.base import MoEArchitecture
from compress_tools.architectures.layouts import OneByOne, Stacked

EXPERT = "layers.{layer}.feed_forward.experts.{expert}"

JAMBA = MoEArchitecture(
    model_type="jamba",
    title="Jamba",
    models=("Jamba-1.7-Mini (bf16)", "Jamba-1.7-Large (bf16)"),
    expert=EXPERT,
    layouts=(OneByOne(EXPERT), Stacked("layers.{layer}.feed_forward.experts")),
    intermediate_size_keys=("intermediate_size",),
    own_output=True,
    vllm_cpu=False,
    runs_in="it has no kernel for Mamba's selective scan; run in transformers",
)
