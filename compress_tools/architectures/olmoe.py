"""OLMoE: ``mlp.experts.k.gate_proj|up_proj|down_proj``, many small experts."""

from compress_tools.architectures.base import MoEArchitecture

OLMOE = MoEArchitecture(
    model_type="olmoe",
    title="OLMoE",
    models=("OLMoE-1B-7B (bf16)",),
    intermediate_size_keys=("intermediate_size",),
    own_output=True,
)
FLEX_OLMO = MoEArchitecture(
    model_type="flex_olmo",
    title="FlexOlmo",
    models=("FlexOlmo-7x7B (bf16)",),
    intermediate_size_keys=("intermediate_size",),
)
