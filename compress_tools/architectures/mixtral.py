"""Mixtral and what copied its layout: ``block_sparse_moe.experts.k.w1|w3|w2``."""

from compress_tools.architectures.base import MIXTRAL_PROJECTIONS, MoEArchitecture
from compress_tools.architectures.layouts import OneByOne, Stacked

EXPERT = "layers.{layer}.block_sparse_moe.experts.{expert}"
LAYOUTS = (OneByOne(EXPERT, dict(MIXTRAL_PROJECTIONS)), Stacked())

MIXTRAL = MoEArchitecture(
    model_type="mixtral",
    title="Mixtral",
    models=("Mixtral-8x7B (bf16)", "Mixtral-8x22B (bf16)"),
    expert=EXPERT,
    projections=MIXTRAL_PROJECTIONS,
    layouts=LAYOUTS,
    intermediate_size_keys=("intermediate_size",),
    renames=((r"\.mlp\.gate\.", ".block_sparse_moe.gate."),),
)

PHIMOE = MoEArchitecture(
    model_type="phimoe",
    title="Phi-3.5-MoE",
    models=("Phi-3.5-MoE (bf16)",),
    expert=EXPERT,
    projections=MIXTRAL_PROJECTIONS,
    layouts=LAYOUTS,
    intermediate_size_keys=("intermediate_size",),
    own_output=True,
    renames=((r"\.mlp\.router\.", ".block_sparse_moe.gate."),),
)

MINIMAX_M2 = MoEArchitecture(
    model_type="minimax_m2",
    title="MiniMax-M2",
    models=("MiniMax-M2 (fp8)", "MiniMax-M2.1 (fp8)", "MiniMax-M2.5 (fp8)", "MiniMax-M2.7 (fp8)"),
    expert=EXPERT,
    projections=MIXTRAL_PROJECTIONS,
    layouts=LAYOUTS,
    intermediate_size_keys=("intermediate_size",),
    own_output=True,
    renames=((r"\.mlp\.(gate\.|e_score)", r".block_sparse_moe.\1"),),
    vllm_cpu=False,
    runs_in="it can't route sigmoid scores without groups, plain checkpoints included; run in transformers",
)

MINIMAX_M3 = MoEArchitecture(
    model_type="minimax_m3_vl",
    title="MiniMax-M3",
    aliases=("minimax_m3_vl_text",),
    models=("MiniMax-M3 (bf16, mxfp8)",),
    expert=EXPERT,
    projections=MIXTRAL_PROJECTIONS,
    layouts=(LAYOUTS[0],),
    intermediate_size_keys=("intermediate_size",),
    vllm_cpu=False,
    runs_in="its module imports torchvision, of which there is no build beside that torch; run in transformers",
)

MINIMAX = MoEArchitecture(
    model_type="minimax",
    title="MiniMax-Text-01",
    models=("MiniMax-Text-01 (bf16)",),
    expert=EXPERT,
    projections=MIXTRAL_PROJECTIONS,
    layouts=LAYOUTS,
    intermediate_size_keys=("intermediate_size",),
    renames=((r"\.mlp\.gate\.", ".block_sparse_moe.gate."),),
    vllm=False,
    runs_in="transformers only: vLLM dropped the family in 0.23",
)
