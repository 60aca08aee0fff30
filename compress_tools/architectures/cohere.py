"""Cohere's Command-A+ MoE: attention and experts in parallel; embeddings are tied."""

from compress_tools.architectures.base import MoEArchitecture

COHERE2_MOE = MoEArchitecture(
    model_type="cohere2_moe",
    title="Cohere2-MoE",
    models=("Command-A+ (bf16)",),
    intermediate_size_keys=("intermediate_size",),
    tied=True,
)
