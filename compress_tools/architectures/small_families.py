"""Families whose rows say nothing but their names: one by one below ``mlp.experts``, as the default is."""

from compress_tools.architectures.base import MoEArchitecture

MELLUM = MoEArchitecture(
    model_type="mellum", title="Mellum2", models=("Mellum2",), intermediate_size_keys=("moe_intermediate_size",)
)
SOLAR_OPEN = MoEArchitecture(
    model_type="solar_open",
    title="Solar-Open",
    models=("Solar-Open-100B",),
    intermediate_size_keys=("moe_intermediate_size",),
)
