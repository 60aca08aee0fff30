"""Qwen3-MoE: ``mlp.experts.k.gate_proj|up_proj|down_proj``; dense layers may stand between."""

from compress_tools.architectures.base import MoEArchitecture
from compress_tools.format.schema import ExpertNames

QWEN3_MOE = MoEArchitecture(
    model_type="qwen3_moe",
    title="Qwen3-MoE",
    names=ExpertNames(
        expert="model.layers.{layer}.mlp.experts.{expert}",
        projections={"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"},
    ),
    num_experts_keys=("num_experts", "num_local_experts"),
    intermediate_size_key="moe_intermediate_size",
)
