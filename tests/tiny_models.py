"""Tiny models of each family from their transformers configs: the real classes, random weights, seeded."""

from pathlib import Path
from typing import Any

import torch
import transformers

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

TINY_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "Mixtral",
        {"intermediate_size": 48, "num_hidden_layers": 3, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "olmoe": (
        "Olmoe",
        {"intermediate_size": 24, "num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 3},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "intermediate_size": 64,
            "moe_intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "mlp_only_layers": [1],
        },
    ),
}


def save_tiny_model(
    family: str, path: Path, dtype: torch.dtype, seed: int = 0, max_shard_size: str = "1GB", **changes: Any
) -> Path:
    """Build and save one.

    Args:
        family: a key of ``TINY_CONFIGS``.
        path: directory to write.
        dtype: stored dtype.
        seed: of the random weights.
        max_shard_size: as transformers takes it.
        changes: config fields to override.
    Returns:
        ``path``.
    """
    prefix, sizes = TINY_CONFIGS[family]
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **sizes, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).to(dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path
