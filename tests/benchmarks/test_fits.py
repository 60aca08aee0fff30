"""The arithmetic of `python -m benchmarks.fits`."""

import pytest

from benchmarks.fits import FORMS, expert_bytes, footprint
from benchmarks.harness.shapes import SHAPES
from benchmarks.models.synthetic_layer import synthetic_format, synthetic_layer


@pytest.mark.parametrize(
    ("name", "billions"), [("OLMoE-1B-7B", 6.92), ("Qwen3-30B-A3B", 30.53), ("Mixtral-8x7B", 46.70)]
)
def test_originals_have_their_published_number_of_parameters(name: str, billions: float) -> None:
    own = footprint(SHAPES[name], None)
    assert (own.experts + own.others) / 2e9 == pytest.approx(billions, abs=0.01)


def test_kv_cache_of_mixtral() -> None:
    """32 layers, 8 heads of 128, key and value in bf16: 128 KiB a token."""
    own = footprint(SHAPES["Mixtral-8x7B"], None)
    assert own.kv_per_token == 128 * 1024
    assert own.cached_tokens(80) < 0 < own.cached_tokens(141)


@pytest.mark.parametrize(("form", "method"), [("prune 25 %", "prune"), ("low rank 25 %", "low-rank")])
def test_expert_bytes_are_what_the_plugin_holds(form: str, method: str) -> None:
    shape = SHAPES["OLMoE-1B-7B"]
    _, tensors = synthetic_layer(synthetic_format(shape, method=method, retain_ratio=0.25), 0)
    assert expert_bytes(shape, FORMS[form]) == shape.layers * sum(tensor.nbytes for tensor in tensors)
