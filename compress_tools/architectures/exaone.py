"""K-EXAONE: a shared expert, sliding and full attention in turn."""

from compress_tools.architectures.base import MoEArchitecture

EXAONE_MOE = MoEArchitecture(
    model_type="exaone_moe",
    title="K-EXAONE",
    models=("K-EXAONE-236B-A23B (bf16, fp8)",),
    intermediate_size_keys=("moe_intermediate_size",),
    renames=((r"\.mlp\.gate\.e_score_correction_bias$", ".mlp.e_score_correction_bias"),),
)
