"""Tiny models of each family from their transformers configs: the real classes, random weights, seeded."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.models.published_layouts import PUBLISH
from compress_tools.architectures.base import NESTED

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DEEPSEEK_STYLE: dict[str, Any] = {
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
# MLA: vLLM's kernels want these head sizes even in a toy.
MLA: dict[str, Any] = {
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}

# Sparse attention: an indexer picks the keys.
INDEXER: dict[str, Any] = {"q_lora_rank": 48, "index_n_heads": 2, "index_head_dim": 128, "index_topk": 64}
SMALL_EXPERTS: dict[str, Any] = {
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}
SHARED_STYLE: dict[str, Any] = {**SMALL_EXPERTS, "head_dim": 32, "num_shared_experts": 1, "first_k_dense_replace": 1}
# Linear attention in three layers of four.
HYBRID: dict[str, Any] = {
    "num_hidden_layers": 4,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "head_dim": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
# The multipliers are factors that a tiny model has to feel; tied, as published.
GRANITE: dict[str, Any] = {
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.125,
    "logits_scaling": 0.5,
    "tie_word_embeddings": True,
}

LING: dict[str, Any] = {**DEEPSEEK_STYLE, "n_group": 2, "head_dim": 32, "use_qk_norm": True}
VISION: dict[str, Any] = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
TOKENS: dict[str, Any] = {"image_token_id": 120, "video_token_id": 121}
# Positions in time, height and width share a head's 16 frequencies.
SECTIONS: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
# Why transformers can't run a family as it is published.
NO_CLASS = "no class for it"
NOT_IN_TRANSFORMERS = {
    "deepseek": NO_CLASS,
    "bailing_moe": NO_CLASS,
    "sarvam_moe": NO_CLASS,
    "param2moe": NO_CLASS,
    "longcat_flash": "compressed alone: dense, its class wants gates of experts that compute nothing",
}
# Classes that are not called after their family's prefix.
CLASSES = {"minimax_m3_vl": "MiniMaxM3SparseForConditionalGeneration"}
# Families that are published with stacked experts, though transformers would write them one by one.
PUBLISHED_STACKED = frozenset({"qwen3_5_moe"})

# model_type -> (prefix of the transformers classes, config fields)
TINY_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "Mixtral",
        {"intermediate_size": 48, "num_hidden_layers": 3, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "olmoe": (
        "Olmoe",
        {"intermediate_size": 24, "num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 3},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "intermediate_size": 64,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_experts": 6,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "intermediate_size": 64,
            "moe_intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "head_dim": 32,
            "mlp_only_layers": [1],
        },
    ),
    "phimoe": (
        "Phimoe",
        {
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "lm_head_bias": True,
        },
    ),
    "deepseek_v2": ("DeepseekV2", {**DEEPSEEK_STYLE, **MLA}),
    "deepseek_v3": ("DeepseekV3", {**DEEPSEEK_STYLE, **MLA, "topk_method": "noaux_tc"}),
    # The original 16B layout has no class in transformers: GLM's weights without its extras are the same tensors.
    "deepseek": ("Glm4Moe", {**DEEPSEEK_STYLE, "num_key_value_heads": 2, "head_dim": 32}),
    "glm4_moe": ("Glm4Moe", {**DEEPSEEK_STYLE, "head_dim": 32}),
    "dots1": ("Dots1", {**DEEPSEEK_STYLE, "head_dim": 32}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 3,
            "moe_num_experts": 6,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
        },
    ),
    "minimax_m2": (
        "MiniMaxM2",
        {
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "head_dim": 32,
            "rotary_dim": 16,
        },
    ),
    "qwen3_next": ("Qwen3Next", {**HYBRID, "intermediate_size": 48}),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        {
            "text_config": {**COMMON, **HYBRID},
            "vision_config": {**VISION, "num_position_embeddings": 16},
            **TOKENS,
        },
    ),
    "gemma4": (
        "Gemma4",
        {
            **SMALL_EXPERTS,
            "num_hidden_layers": 4,
            "top_k_experts": 2,
            "enable_moe_block": True,
            "head_dim": 32,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 128,
        },
    ),
    "glm4_moe_lite": ("Glm4MoeLite", {**DEEPSEEK_STYLE, **MLA, "q_lora_rank": 48}),
    "glm_moe_dsa": ("GlmMoeDsa", {**DEEPSEEK_STYLE, **MLA, **INDEXER}),
    "deepseek_v32": ("DeepseekV32", {**DEEPSEEK_STYLE, **MLA, **INDEXER}),
    # The last two are fields of published checkpoints that vLLM reads and transformers does not write.
    "afmoe": (
        "Afmoe",
        {
            **SMALL_EXPERTS,
            "num_hidden_layers": 4,
            "head_dim": 32,
            "num_dense_layers": 1,
            "num_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "score_func": "sigmoid",
            "route_norm": True,
        },
    ),
    "exaone_moe": ("ExaoneMoe", {**SHARED_STYLE, "num_hidden_layers": 4, "n_group": 1, "topk_group": 1}),
    "lfm2_moe": (
        "Lfm2Moe",
        {
            **SMALL_EXPERTS,
            "num_hidden_layers": 4,
            "num_dense_layers": 1,
            "layer_types": ["conv", "conv", "full_attention", "full_attention"],
        },
    ),
    "cohere2_moe": (
        "Cohere2Moe",
        {"intermediate_size": 24, "num_hidden_layers": 4, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 32},
    ),
    # From `hybrid_layer_pattern` on: fields of published checkpoints that vLLM reads and transformers does not write.
    "mimo_v2_flash": (
        "MiMoV2Flash",
        {
            **DEEPSEEK_STYLE,
            "head_dim": 32,
            "v_head_dim": 32,
            "hybrid_layer_pattern": [0, 1, 1],
            "moe_layer_freq": [0, 1, 1],
            "layernorm_epsilon": 1e-5,
            "swa_head_dim": 32,
            "swa_v_head_dim": 32,
            "swa_num_attention_heads": 2,
            "swa_num_key_value_heads": 1,
            "sliding_window_size": 128,
            "rope_theta": 1e4,
            "swa_rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "add_swa_attention_sink_bias": True,
            "add_full_attention_sink_bias": False,
        },
    ),
    "mellum": ("Mellum", {**SMALL_EXPERTS, "num_hidden_layers": 4, "head_dim": 32}),
    "solar_open": ("SolarOpen", {**DEEPSEEK_STYLE, "head_dim": 32}),
    "flex_olmo": (
        "FlexOlmo",
        {"intermediate_size": 24, "num_hidden_layers": 2, "num_experts": 6, "num_experts_per_tok": 2},
    ),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1",
        {"intermediate_size": 24, "num_hidden_layers": 2, "num_experts": 6, "moe_topk": 2, "head_dim": 32},
    ),
    # The last three are fields of published checkpoints that vLLM reads and transformers does not write.
    "hy_v3": (
        "HYV3",
        {**SHARED_STYLE, "num_hidden_layers": 3, "expert_hidden_dim": 24, "route_norm": True, "qk_norm": True},
    ),
    "jamba": (
        "Jamba",
        {
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "laguna": (
        "Laguna",
        {**SMALL_EXPERTS, "num_hidden_layers": 3, "head_dim": 32, "shared_expert_intermediate_size": 24},
    ),
    "minimax": (
        "MiniMax",
        {
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "head_dim": 32,
        },
    ),
    "granitemoe": ("GraniteMoe", GRANITE),
    "granitemoeshared": ("GraniteMoeShared", {**GRANITE, "shared_intermediate_size": 40}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            **GRANITE,
            "shared_intermediate_size": 40,
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
        },
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoe",
        {
            "text_config": {
                **COMMON,
                **SMALL_EXPERTS,
                "num_hidden_layers": 2,
                "head_dim": 32,
                "rope_parameters": SECTIONS,
            },
            "vision_config": {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            **TOKENS,
        },
    ),
    "qwen3_omni_moe": (
        "Qwen3OmniMoe",
        {
            "thinker_config": {
                "text_config": {
                    **COMMON,
                    **SMALL_EXPERTS,
                    "num_hidden_layers": 2,
                    "head_dim": 32,
                    "rope_parameters": SECTIONS,
                },
                "vision_config": {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
                "audio_config": {
                    "d_model": 32,
                    "encoder_layers": 1,
                    "encoder_attention_heads": 2,
                    "encoder_ffn_dim": 32,
                    "num_mel_bins": 16,
                    "downsample_hidden_size": 8,
                    "output_dim": 64,
                    "max_source_positions": 64,
                },
                **TOKENS,
                "audio_token_id": 122,
            },
            "enable_audio_output": False,
        },
    ),
    "deepseek_v4": (
        "DeepseekV4",
        {
            "moe_intermediate_size": 24,
            "num_hidden_layers": 4,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "head_dim": 64,
            "q_lora_rank": 48,
            "o_groups": 2,
            "o_lora_rank": 32,
            "index_n_heads": 2,
            "index_head_dim": 64,
            "index_topk": 4,
            "sliding_window": 8,
            "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
            "layer_types": [
                "sliding_attention",
                "compressed_sparse_attention",
                "heavily_compressed_attention",
                "compressed_sparse_attention",
            ],
            "swiglu_limit": 0.05,
        },
    ),
    "minimax_m3_vl": (
        "MiniMaxM3VL",
        {
            "text_config": {
                **COMMON,
                "intermediate_size": 24,
                "dense_intermediate_size": 48,
                "shared_intermediate_size": 24,
                "num_hidden_layers": 3,
                "num_local_experts": 6,
                "num_experts_per_tok": 2,
                "head_dim": 32,
                "rotary_dim": 16,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
                "swiglu_limit": 0.05,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "projector_hidden_size": 64,
            "image_token_index": 120,
            "video_token_index": 121,
        },
    ),
    # A limit as in the last layers of published ones.
    "step3p5": (
        "Step3p7",
        {
            "text_config": {
                **COMMON,
                "intermediate_size": 48,
                "moe_intermediate_size": 24,
                "share_expert_dim": 24,
                "num_hidden_layers": 4,
                "n_routed_experts": 6,
                "num_experts_per_tok": 2,
                "head_dim": 32,
                "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
                "sliding_window": 16,
                "swiglu_limits": [0.0, 0.0, 0.0, 0.02],
            },
            "vision_config": {
                "width": 32,
                "layers": 1,
                "heads": 2,
                "mlp_ratio": 1.0,
                "image_size": 28,
                "patch_size": 14,
            },
            "image_token_id": 120,
        },
    ),
    "mistral4": ("Mistral4", {**DEEPSEEK_STYLE, **MLA, "q_lora_rank": 48, "first_k_dense_replace": 0}),
    "kimi_k25": (
        "Kimi_K25",
        {
            "text_config": {**COMMON, **DEEPSEEK_STYLE, **MLA, "q_lora_rank": 48, "model_type": "kimi_k2"},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "pos_emb_height": 4,
                "pos_emb_width": 4,
            },
            "projection_hidden_size": 32,
            "image_token_id": 120,
            "video_token_id": 121,
            "vision_start_token_id": 122,
            "vision_end_token_id": 123,
            "tie_word_embeddings": False,
        },
    ),
    "glm5_next": (
        "Glm5Next",
        {
            "text_config": {
                **COMMON,
                **DEEPSEEK_STYLE,
                **MLA,
                "qk_rope_head_dim": 0,
                "num_hidden_layers": 4,
                "q_lora_rank": 48,
                "index_n_heads": 2,
                "index_head_dim": 32,
                "index_topk": 32,
                "index_kpool": 4,
                "linear_head_dim": 32,
                "linear_num_heads": 2,
                "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
                "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
                "swiglu_limit": 0.05,
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 64,
                "projection_intermediate_size": 32,
                "image_size": 28,
            },
            **TOKENS,
        },
    ),
    "inkling_mm_model": (
        "Inkling",
        {
            "text_config": {
                **COMMON,
                "intermediate_size": 48,
                "moe_intermediate_size": 24,
                "num_hidden_layers": 3,
                "n_routed_experts": 6,
                "num_experts_per_tok": 2,
                "n_shared_experts": 1,
                "head_dim": 32,
                "swa_num_attention_heads": 2,
                "swa_num_key_value_heads": 1,
                "swa_head_dim": 32,
                "sliding_window_size": 16,
                "d_rel": 8,
                "rel_extent": 32,
                "logits_mup_width_multiplier": 2.0,
                "route_scale": 2.0,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
                "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
            },
            "audio_config": {"n_mel_bins": 4, "mel_vocab_size": 8, "text_hidden_size": 64},
            "vision_config": {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "text_hidden_size": 64,
            },
            "image_token_id": 120,
            "audio_token_id": 121,
            "image_bos_token_id": 122,
            "audio_bos_token_id": 123,
        },
    ),
    # `linear_attn_config` counts layers from 1.
    "kimi_linear": (
        "KimiLinear",
        {
            **SMALL_EXPERTS,
            **MLA,
            "num_hidden_layers": 4,
            "n_shared_experts": 1,
            "linear_attn_config": {
                "head_dim": 32,
                "num_heads": 2,
                "short_conv_kernel_size": 4,
                "kda_layers": [1, 2, 4],
                "full_attn_layers": [3],
            },
        },
    ),
    # The last three are fields of published checkpoints that vLLM reads and transformers does not write.
    "longcat_flash": (
        "LongcatFlash",
        {
            **MLA,
            "q_lora_rank": 48,
            "num_layers": 2,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 24,
            "n_routed_experts": 6,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "zero_expert_type": "identity",
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
        },
    ),
    "axk1": ("AXK1", {**DEEPSEEK_STYLE, **MLA, "q_lora_rank": 48}),
    # Ling's layers compute what GLM's do: same tensors under other names, query, key and value in one.
    "bailing_moe": ("Glm4Moe", LING),
    "sarvam_moe": ("Glm4Moe", LING),
    "param2moe": ("Glm4Moe", LING),
    "glm4v_moe": (
        "Glm4vMoe",
        {
            "text_config": {
                **COMMON,
                **DEEPSEEK_STYLE,
                "head_dim": 32,
                "rope_parameters": {**SECTIONS, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5},
            },
            "vision_config": {**VISION, "image_size": 28},
            **TOKENS,
        },
    ),
    "llama4": (
        "Llama4",
        {
            "text_config": {
                **COMMON,
                "head_dim": 32,
                "intermediate_size": 24,
                "intermediate_size_mlp": 48,
                "num_hidden_layers": 4,
                "interleave_moe_layer_step": 2,
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                # vLLM's: whole blocks of its CPU build's cache
                "attention_chunk_size": 128,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 128,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "vision_output_dim": 64,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
            },
            "image_token_index": 120,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "num_hidden_layers": 4,
            "head_dim": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 40,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 16,
            "chunk_size": 16,
        },
    ),
    # A multiple of 32: vLLM's dense kernel on a CPU takes no other.
    "gpt_oss": (
        "GptOss",
        {
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 32,
        },
    ),
    "switch_transformers": (
        "SwitchTransformers",
        {
            "d_model": 64,
            "d_ff": 48,
            "d_kv": 16,
            "num_heads": 2,
            "num_layers": 4,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 1,
            "num_experts": 4,
            "decoder_start_token_id": 0,
            "initializer_factor": 0.5,
        },
    ),
}


def save_tiny_model(
    family: str,
    path: Path,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    max_shard_size: str = "1GB",
    save_original_format: bool = True,
    **changes: Any,
) -> Path:
    """Build and save one.

    Args:
        family: a key of ``TINY_CONFIGS``.
        path: directory to write.
        dtype: stored dtype.
        seed: of the random weights.
        max_shard_size: as transformers takes it.
        save_original_format: the layout in which the family is published; False: transformers' 3-D expert tensors.
        changes: config fields to override.
    Returns:
        ``path``.
    """
    prefix, sizes = TINY_CONFIGS[family]
    whole = any(key in sizes for key in NESTED)
    # Without a nested config a multimodal family's language model alone.
    kinds = (f"{prefix}Config",) if whole else (f"{prefix}TextConfig", f"{prefix}Config")
    kind = next(name for name in kinds if hasattr(transformers, name))
    config = getattr(transformers, kind)(**{**({} if whole else COMMON), **sizes, **changes})
    head = "ForConditionalGeneration" if whole or config.is_encoder_decoder else "ForCausalLM"
    torch.manual_seed(seed)
    model = getattr(transformers, CLASSES.get(family, f"{prefix}{head}"))(config)
    _vary_constants(model, torch.Generator().manual_seed(seed))
    model.to(dtype)
    one_by_one = save_original_format and family not in PUBLISHED_STACKED
    model.save_pretrained(path, max_shard_size=max_shard_size, save_original_format=one_by_one)
    if family in PUBLISH:
        PUBLISH[family](path, config, published=one_by_one)
    return path


def load_model(path: Path, **options: Any) -> nn.Module:
    """The model of a checkpoint in transformers, by the class that config.json names, in fp32 unless asked otherwise.

    Args:
        path: checkpoint directory.
        options: of ``from_pretrained``.
    """
    named = json.loads((path / "config.json").read_text())["architectures"][0]
    known = getattr(transformers, named, transformers.AutoModelForCausalLM)
    return known.from_pretrained(path, **{"dtype": torch.float32, **options})


def token_logits(model: nn.Module, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of tokens ``[B, T]``, ``[B, T, V]``.

    Args:
        model: of ``load_model``.
        tokens: token ids.
        targets: an encoder-decoder's decoder reads these, ``tokens`` if there are none.
    """
    inputs = {"decoder_input_ids": tokens if targets is None else targets} if model.config.is_encoder_decoder else {}
    # Qwen3-Omni: the part that reads and writes text; the rest speaks.
    with torch.no_grad():
        return getattr(model, "thinker", model)(input_ids=tokens, **inputs).logits


def _vary_constants(model: nn.Module, generator: torch.Generator) -> None:
    """Move every tensor that transformers starts at one value away from it: norms of 1, biases and routers of 0.

    A factor that is 1 or a term that is 0 hides whether anyone multiplies or adds it. DeepSeek-V4's tables of experts
    by token get different experts in each row.
    """
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("tid2eid"):
                experts = model.config.n_routed_experts
                order = torch.rand(len(tensor), experts, generator=generator).argsort(dim=1)
                tensor.copy_(order[:, : tensor.shape[1]])
            if tensor.is_floating_point() and tensor.numel() and bool((tensor == tensor.flatten()[0]).all()):
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
