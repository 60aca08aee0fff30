"""What is said of the KV cache: bytes a token by kind of attention, and the card that has room."""

import pytest
from transformers import AutoConfig

from compress_tools.kv_cache import CARDS, LEAST_LEFT, USED, bytes_per_token, cache_text

OLMOE = {"num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (OLMOE, 16 * 2 * 2048 * 2),
        (OLMOE | {"num_key_value_heads": 4, "head_dim": 64}, 16 * 2 * 4 * 64 * 2),
        ({"text_config": OLMOE, "hidden_size": 7}, 16 * 2 * 2048 * 2),
        # DeepSeek-V3's latent attention
        (OLMOE | {"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 16 * 576 * 2),
        # Qwen3-Next: one layer of four
        (OLMOE | {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 4}, 4 * 2 * 2048 * 2),
        (OLMOE | {"mamba_d_state": 128}, None),
        ({}, None),
    ],
)
def test_bytes_of_a_token(config: dict, expected: int | None) -> None:
    assert bytes_per_token(config) == expected


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
def test_bytes_of_a_token_are_those_of_transformers_defaults(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    expected = config.num_hidden_layers * 2 * config.num_key_value_heads * width * 2
    assert bytes_per_token(config.to_dict()) == expected


@pytest.mark.parametrize("weights", [10**6, 7 * 10**9, 14 * 10**9, 60 * 10**9, 200 * 10**9])
def test_the_smallest_card_with_room_is_named(weights: int) -> None:
    text = cache_text(OLMOE, weights)
    card = next(size for size in CARDS if f"a card of {size} GiB" in text)
    left = USED * card * 2**30 - weights
    assert left >= LEAST_LEFT * card * 2**30
    smaller = [size for size in CARDS if size < card]
    assert not smaller or USED * smaller[-1] * 2**30 - weights < LEAST_LEFT * smaller[-1] * 2**30
    assert f"{int(left) // bytes_per_token(OLMOE):,} tokens" in text


def test_what_no_card_holds_is_said() -> None:
    assert "No single card" in cache_text({}, 10**12)
