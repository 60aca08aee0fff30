"""LongCat-Flash: two attentions and two dense MLPs in a layer, beside experts of which some pass their input on."""

from compress_tools.architectures.base import MoEArchitecture

# Experts that compute nothing have no weights: `zero_expert_num` counts them, `n_routed_experts` the others.
LONGCAT_FLASH = MoEArchitecture(
    model_type="longcat_flash",
    title="LongCat-Flash",
    models=("LongCat-Flash-Chat (bf16, fp8)",),
    num_experts_keys=("n_routed_experts",),
    intermediate_size_keys=("expert_ffn_hidden_size", "moe_intermediate_size"),
    num_layers_keys=("num_layers",),
    own_output=True,
    vllm_cpu=False,
    runs_in="its router is a kernel for GPUs; run in transformers",
)
