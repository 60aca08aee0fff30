"""`resmoe eval --backend vllm` says what transformers says."""

import pytest

from compress_tools.evaluation.config import make_text_config
from compress_tools.evaluation.perplexity import evaluate

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_same_numbers_as_transformers(trained) -> None:
    original, small = map(str, trained)
    asked = {"text": f"{original}/heldout.txt", "max_tokens": 150, "against": original}
    wanted = evaluate(small, make_text_config(**asked))
    found = evaluate(small, make_text_config(**asked, backend="vllm"))
    assert (found.kl_over, found.dtype) == ("whole vocabulary", "float32")
    assert (found.window, found.stride, found.tokens_scored) == (wanted.window, wanted.stride, wanted.tokens_scored)
    assert found.perplexity == pytest.approx(wanted.perplexity, rel=1e-4)
    assert found.original_perplexity == pytest.approx(wanted.original_perplexity, rel=1e-4)
    assert wanted.kl_nats > 1e-4
    assert found.kl_nats == pytest.approx(wanted.kl_nats, rel=1e-2, abs=1e-6)
    assert found.top1_agreement == pytest.approx(wanted.top1_agreement, abs=0.01)

    bound = evaluate(small, make_text_config(**asked, backend="vllm", top_k=16))
    assert -1e-6 <= bound.kl_nats <= found.kl_nats + 1e-6
    assert "lower bound" in bound.kl_over
    assert bound.perplexity == pytest.approx(found.perplexity, rel=1e-6)
    assert bound.top1_agreement == pytest.approx(found.top1_agreement, abs=0.01)
