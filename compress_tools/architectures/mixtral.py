"""Mixtral: ``block_sparse_moe.experts.k.w1|w3|w2``."""

from compress_tools.architectures.base import MoEArchitecture
from compress_tools.format.schema import ExpertNames

MIXTRAL = MoEArchitecture(
    model_type="mixtral",
    title="Mixtral",
    names=ExpertNames(
        expert="model.layers.{layer}.block_sparse_moe.experts.{expert}",
        projections={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    ),
    num_experts_keys=("num_local_experts",),
    intermediate_size_key="intermediate_size",
)
