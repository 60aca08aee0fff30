"""Thinking Machines' Inkling: stacked experts whose gate and up rows alternate, ``w13_weight`` and ``w2_weight``."""

from compress_tools.architectures.base import MoEArchitecture
from compress_tools.architectures.layouts import OneByOne, Stacked

INKLING = MoEArchitecture(
    model_type="inkling_mm_model",
    title="Inkling",
    aliases=("inkling_text",),
    models=("Inkling (bf16, nvfp4)", "Inkling-Small (bf16, nvfp4)"),
    layouts=(
        Stacked("layers.{layer}.mlp.experts", ("w13_weight",), "w2_weight", interleaved=True),
        Stacked(),
        OneByOne(),
    ),
    intermediate_size_keys=("moe_intermediate_size",),
    vllm=False,
    runs_in="transformers only: vLLM's loader of it takes stacked experts alone",
)
