"""Mistral Small 4: MLA, experts stacked in 3-D tensors, fp8 by tensor."""

from compress_tools.architectures.base import MoEArchitecture
from compress_tools.architectures.layouts import OneByOne, Stacked

MISTRAL4 = MoEArchitecture(
    model_type="mistral4",
    title="Mistral Small 4",
    models=("Mistral-Small-4-119B (fp8)",),
    layouts=(Stacked(), OneByOne()),
    intermediate_size_keys=("moe_intermediate_size",),
    vllm_cpu=False,
    runs_in="its Transformers backend takes MLA heads of this size with VLLM_MLA_DISABLE=1 alone; run in transformers",
)
