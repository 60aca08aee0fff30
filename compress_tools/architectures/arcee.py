"""Arcee's Trinity (AFMoE): dense first layers, a shared expert, gated attention."""

from compress_tools.architectures.base import MoEArchitecture

AFMOE = MoEArchitecture(
    model_type="afmoe",
    title="Trinity (AFMoE)",
    models=("Trinity-Nano (bf16)", "Trinity-Mini (bf16)", "Trinity-Large (bf16)"),
    intermediate_size_keys=("moe_intermediate_size",),
    own_output=True,
)
