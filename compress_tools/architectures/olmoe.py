"""OLMoE: ``mlp.experts.k.gate_proj|up_proj|down_proj``, many small experts."""

from compress_tools.architectures.base import MoEArchitecture

OLMOE = MoEArchitecture(model_type="olmoe", title="OLMoE", intermediate_size_keys=("intermediate_size",))
