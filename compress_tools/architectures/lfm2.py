"""LFM2-MoE: convolutions beside attention, ``feed_forward.experts.k.w1|w3|w2``; embeddings are tied."""

from compress_tools.architectures.base import MIXTRAL_PROJECTIONS, MoEArchitecture
from compress_tools.architectures.layouts import OneByOne, Stacked

EXPERT = "layers.{layer}.feed_forward.experts.{expert}"

LFM2_MOE = MoEArchitecture(
    model_type="lfm2_moe",
    title="LFM2-MoE",
    models=("LFM2-8B-A1B (bf16)", "LFM2.5-8B-A1B (bf16)"),
    expert=EXPERT,
    projections=MIXTRAL_PROJECTIONS,
    layouts=(OneByOne(EXPERT, dict(MIXTRAL_PROJECTIONS)), Stacked("layers.{layer}.feed_forward.experts")),
    intermediate_size_keys=("moe_intermediate_size",),
    tied=True,
)
