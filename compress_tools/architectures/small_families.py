"""Families whose rows say nothing but their names: one by one below ``mlp.experts``, as the default is."""

from compress_tools.architectures.base import MoEArchitecture

MELLUM = MoEArchitecture(
    model_type="mellum", title="Mellum2", models=("Mellum2 (bf16)",), intermediate_size_keys=("moe_intermediate_size",)
)
SOLAR_OPEN = MoEArchitecture(
    model_type="solar_open",
    title="Solar-Open",
    models=("Solar-Open-100B (bf16)",),
    intermediate_size_keys=("moe_intermediate_size",),
)
MIMO_V2 = MoEArchitecture(
    model_type="mimo_v2_flash",
    title="MiMo-V2",
    models=("MiMo-V2-Flash (fp8)",),
    aliases=("mimo_v2",),
    intermediate_size_keys=("moe_intermediate_size",),
    own_output=True,
    renames=((r"\.self_attn\.sinks$", ".self_attn.attention_sink_bias"),),
)
