"""OLMoE: ``mlp.experts.k.gate_proj|up_proj|down_proj``, many small experts."""

from compress_tools.architectures.base import MoEArchitecture
from compress_tools.format.schema import ExpertNames

OLMOE = MoEArchitecture(
    model_type="olmoe",
    title="OLMoE",
    names=ExpertNames(
        expert="model.layers.{layer}.mlp.experts.{expert}",
        projections={"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"},
    ),
    num_experts_keys=("num_experts", "num_local_experts"),
    intermediate_size_key="intermediate_size",
)
