"""Tiny models of each family from their transformers configs: the real classes, random weights, seeded."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

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
    if family == "deepseek":
        _as_deepseek_moe(path, config)
    elif family in LING_ARCHITECTURES:
        _as_ling(path, family, config)
    elif family == "qwen3_vl_moe" and save_original_format:
        _edit_tensors(path, lambda name, tensor: {name: tensor.mT if ".mlp.experts." in name else tensor})
    elif family == "deepseek_v4" and one_by_one:
        _edit_tensors(path, lambda name, tensor: {_v4_name(name): tensor})
        ratios = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
        _edit_config(
            path,
            without=("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters"),
            compress_ratios=[ratios[kind] for kind in config.layer_types],
            num_hash_layers=config.mlp_layer_types.count("hash_moe"),
            qk_rope_head_dim=config.qk_rope_head_dim,
            topk_method="noaux_tc",
            expert_dtype="bf16",
        )
    elif family == "kimi_k25" and one_by_one:
        # transformers takes the decoder's layers for the vision tower's blocks
        decoder = "language_model.model."
        _edit_tensors(path, lambda name, tensor: {name.replace(f"{decoder}blocks.", f"{decoder}layers."): tensor})
    elif family in ("kimi_linear", "minimax_m3_vl"):
        # transformers writes dense layers as if they had experts
        dense = re.compile(r"\.block_sparse_moe\.(gate|up|down)_proj\.")
        _edit_tensors(path, lambda name, tensor: {dense.sub(r".mlp.\1_proj.", name): tensor})
    elif family == "axk1":
        # Its dense layers have a norm that nothing reads.
        norm = f"model.layers.{{}}.{'' if one_by_one else 'mlp.'}post_mlp_layernorm.weight"
        _edit_tensors(
            path,
            lambda name, tensor: {name: tensor, **({norm.format(0): tensor + 1} if name == norm.format(1) else {})},
        )
    elif family == "longcat_flash":
        # transformers writes gates of experts that compute nothing
        idle = tuple(f".experts.{config.n_routed_experts + number}." for number in range(config.zero_expert_num))
        _edit_tensors(path, lambda name, tensor: {} if any(part in name for part in idle) else {name: tensor})
    elif family == "nemotron_h":
        # The layers' kinds as letters, as published; transformers writes a list.
        kinds = config.layers_block_type
        _edit_config(path, hybrid_override_pattern=config.hybrid_override_pattern, num_hidden_layers=len(kinds))
    elif family == "phimoe":
        # The name that published Phi-3.5-MoE checkpoints, and vLLM, use.
        _edit_config(path, architectures=["PhiMoEForCausalLM"])
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


DEEPSEEK_CONFIG_CODE = '''"""DeepSeekMoE's configuration, as a checkpoint's own code."""
from transformers import PreTrainedConfig


class DeepseekConfig(PreTrainedConfig):
    model_type = "deepseek"
'''


def _as_deepseek_moe(path: Path, config: transformers.PreTrainedConfig) -> None:
    """Turn a GLM-4-MoE checkpoint into DeepSeekMoE's original layout: plain softmax routing, its own config code."""
    tensors = load_file(path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "e_score_correction_bias" not in name}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    (path / "configuration_deepseek.py").write_text(DEEPSEEK_CONFIG_CODE)
    fields = {
        **{key: getattr(config, key) for key in (*COMMON, *DEEPSEEK_STYLE, "hidden_act", "rms_norm_eps")},
        "model_type": "deepseek",
        "architectures": ["DeepseekForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
        "dtype": str(next(iter(kept.values())).dtype).removeprefix("torch."),
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


LING_ARCHITECTURES = {
    "bailing_moe": "BailingMoeV2ForCausalLM",
    "sarvam_moe": "SarvamMoEForCausalLM",
    "param2moe": "Param2MoEForCausalLM",
}
LING_NAMES = (
    ("self_attn.o_proj", "attention.dense"),
    ("self_attn.q_norm", "attention.query_layernorm"),
    ("self_attn.k_norm", "attention.key_layernorm"),
    ("model.embed_tokens", "model.word_embeddings"),
    ("mlp.gate.e_score_correction_bias", "mlp.gate.expert_bias"),
)


def _as_ling(path: Path, family: str, config: transformers.PreTrainedConfig) -> None:
    """Turn a GLM-4-MoE checkpoint into Ling's layout, with the family's own config code."""
    tensors = load_file(path / "model.safetensors")
    for layer in range(config.num_hidden_layers):
        attention = f"model.layers.{layer}.self_attn"
        joined = torch.cat([tensors.pop(f"{attention}.{part}_proj.weight") for part in "qkv"])
        tensors[f"model.layers.{layer}.attention.query_key_value.weight"] = joined
    for old, new in LING_NAMES:
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    code = DEEPSEEK_CONFIG_CODE.replace("DeepSeekMoE", LING_ARCHITECTURES[family].removesuffix("ForCausalLM"))
    (path / "configuration.py").write_text(code.replace("deepseek", family).replace("Deepseek", "Ling"))
    fields = {
        **{key: getattr(config, key) for key in (*COMMON, *LING, "hidden_act", "rms_norm_eps", "norm_topk_prob")},
        "model_type": family,
        "architectures": [LING_ARCHITECTURES[family]],
        "auto_map": {"AutoConfig": "configuration.LingConfig"},
        "dtype": str(joined.dtype).removeprefix("torch."),
        "num_experts": config.n_routed_experts,
        "num_shared_experts": config.n_shared_experts,
        "routed_scaling_factor": 2.5,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "router_dtype": "fp32",
        "use_bias": False,
        "use_qkv_bias": False,
        "use_rmsnorm": True,
        "embedding_dropout": 0.0,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def _v4_name(name: str) -> str:
    """DeepSeek-V4's published name of a tensor that transformers writes below ``model.``."""
    name = name.removeprefix("model.").replace("embed_tokens", "embed")
    return name.replace("hc_head.hc_", "hc_head_").replace(".attn.norm.", ".attn.kv_norm.")


def _edit_tensors(path: Path, edit: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    file, found = path / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        found |= edit(name, tensor)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, file, metadata={"format": "pt"})


def _edit_config(path: Path, without: tuple[str, ...] = (), **changes: Any) -> None:
    file = path / "config.json"
    kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in without}
    file.write_text(json.dumps({**kept, **changes}, indent=2) + "\n")
