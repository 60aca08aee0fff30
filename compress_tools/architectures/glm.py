"""GLM-4-MoE (GLM-4.5): shared experts, dense first layers."""

from compress_tools.architectures.base import MoEArchitecture

GLM4_MOE = MoEArchitecture(model_type="glm4_moe", title="GLM-4-MoE", intermediate_size_keys=("moe_intermediate_size",))
