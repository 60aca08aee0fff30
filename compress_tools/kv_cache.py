"""What a model's attention keeps for each token, and what a card has left for it beside the weights."""

from collections.abc import Mapping
from typing import Any, Final

from compress_tools.architectures.base import config_parts
from compress_tools.progress.text import human_bytes

# Memory of the cards that there are, in GiB.
CARDS: Final = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 141, 180, 192, 256, 288)
# vLLM's --gpu-memory-utilization.
USED: Final = 0.92
# A card of which less is left for the cache, as a share of its memory, is too small to serve from.
LEAST_LEFT: Final = 0.1
VALUE_BYTES: Final = 2
# Kinds of layers that keep a state of fixed size and no cache that grows.
_WITHOUT = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp")


def bytes_per_token(config: Mapping[str, Any]) -> int | None:
    """Bytes that the whole model's cache takes for a token, in bf16; None where the config does not tell.

    Sliding windows count like full attention, of which they keep no more.

    Args:
        config: config.json, of a multimodal model as a whole or its language part.
    """
    # The language part of a multimodal model says it, what it does not say the whole.
    config = {key: value for part in config_parts(config) for key, value in part.items()}
    sizes = [config.get(key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")]
    if not all(isinstance(value, int) and value > 0 for value in sizes):
        return None
    layers, hidden, heads = (int(value) for value in sizes if value is not None)
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        layers = sum(kind not in _WITHOUT for kind in kinds)
    elif any("mamba" in key or "linear" in key or key.startswith("hybrid") for key in config):
        return None
    if config.get("kv_lora_rank"):
        return layers * int(config["kv_lora_rank"] + config.get("qk_rope_head_dim", 0)) * VALUE_BYTES
    width = int(config.get("head_dim") or hidden // heads)
    return layers * 2 * int(config.get("num_key_value_heads") or heads) * width * VALUE_BYTES


def cache_text(config: Mapping[str, Any], weight_bytes: int) -> str:
    """What remains for the cache on the smallest card that the weights leave room on.

    Args:
        config: of the model.
        weight_bytes: of all its weight files.
    """
    card = next((size for size in CARDS if _left(size, weight_bytes) >= LEAST_LEFT * size * 2**30), None)
    each = bytes_per_token(config)
    costs = "" if each is None else f"; the cache takes {human_bytes(each)} a token in bf16"
    if card is None:
        return f"No single card of up to {CARDS[-1]} GiB holds {human_bytes(weight_bytes)} and a cache{costs}."
    left = _left(card, weight_bytes)
    tokens = "" if each is None else f", {left // each:,} tokens"
    return (
        f"On a card of {card} GiB, of which vLLM takes {USED:.0%}, {human_bytes(left)} remain for the KV cache and "
        f"activations{tokens}{costs}."
    )


def _left(card: int, weight_bytes: int) -> int:
    return int(USED * card * 2**30) - weight_bytes
