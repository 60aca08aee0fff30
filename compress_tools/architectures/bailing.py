"""Ling and Ring (Bailing), and what copied their layout: ``attention.query_key_value``, ``word_embeddings``."""

from compress_tools.architectures.base import MoEArchitecture

BAILING_MOE = MoEArchitecture(
    model_type="bailing_moe",
    title="Ling 2.0 (Bailing)",
    aliases=("bailing_moe_v2",),
    models=("Ling-mini-2.0 (bf16)", "Ling-flash-2.0 (bf16)", "Ring-flash-2.0 (bf16)", "Ling-1T (bf16, fp8)"),
    intermediate_size_keys=("moe_intermediate_size",),
)
SARVAM_MOE = MoEArchitecture(
    model_type="sarvam_moe",
    title="Sarvam-MoE",
    models=("sarvam-30b (bf16, fp8)",),
    intermediate_size_keys=("moe_intermediate_size",),
)
PARAM2MOE = MoEArchitecture(
    model_type="param2moe",
    title="Param2-MoE",
    models=("Param2-17B-A2.4B-Thinking (bf16)",),
    intermediate_size_keys=("moe_intermediate_size",),
)
