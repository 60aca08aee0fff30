"""A weight is a floating-point number: which dtypes pass, and which are named."""

import pytest

from compress_tools.format.plain_tensors import FLOATS, dtype_fault
from compress_tools.format.shard_file import StoredTensor

GATE, NORM = "model.layers.{}.mlp.gate.weight", "model.layers.{}.input_layernorm.weight"
GOOD = {
    "model.embed_tokens.weight": ("BF16", (8, 4)),
    **{GATE.format(layer): ("F32", (4, 4)) for layer in range(3)},
    **{f"model.layers.{layer}.mlp.gate.e_score_correction_bias": ("F32", (4,)) for layer in range(3)},
    **{NORM.format(layer): ("BF16", (4,)) for layer in range(3)},
    **{f"model.layers.{layer}.A_log": ("F32", (4,)) for layer in range(3)},
    # What is no weight: experts by token, positions, a mask, and what this project defines itself.
    "layers.0.ffn.gate.tid2eid": ("I64", (8, 2)),
    "vision.embeddings.position_ids": ("I64", (1, 16)),
    "h.0.attn.bias": ("BOOL", (1, 1, 8, 8)),
    "model.layers.0.mlp.experts.0.up_proj.resmoe_codes": ("U8", (4, 2)),
}
WRONG = ("I8", "U8", "I16", "I32", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "C64", "F4")


def headers(changes: dict[str, str]) -> dict[str, StoredTensor]:
    return {name: StoredTensor(changes.get(name, dtype), shape, 0, 0) for name, (dtype, shape) in GOOD.items()}


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_precision_of_weights(dtype: str) -> None:
    assert dtype_fault(headers({NORM.format(1): dtype, "model.embed_tokens.weight": dtype})) is None


@pytest.mark.parametrize("dtype", WRONG)
@pytest.mark.parametrize("name", [name for name, (dtype, _) in GOOD.items() if dtype in FLOATS])
def test_what_is_no_weight_is_named(name: str, dtype: str) -> None:
    """By its own name, or (``A_log``) because other layers hold floating-point numbers there."""
    shape = list(GOOD[name][1])
    expected = f"{name!r} is {dtype} {shape}, expected floating-point numbers (BF16, F16, F32, F64)"
    found = dtype_fault(headers({name: dtype}))
    assert found is not None
    assert found.startswith(expected)
