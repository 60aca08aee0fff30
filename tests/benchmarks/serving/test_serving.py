"""A real `vllm serve` of a tiny model trained here: what the client measures is what transformers computes."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import serve
from benchmarks.models.reference_models import build_reference_model, preset_config
from benchmarks.serving.client import Client
from benchmarks.serving.server import ServerError, VllmServer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CONFIG = preset_config("tiny", context_length=96, eval_tokens=512)
PROMPT = "import os\n"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original, in bf16."""
    path = tmp_path_factory.mktemp("served") / "original"
    build_reference_model(CONFIG, path)
    return path


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[VllmServer]:
    """One server for all tests of this file."""
    with VllmServer(model_dir) as running:
        yield running


def test_streaming_says_what_the_completion_says(server: VllmServer):
    client = Client(server)
    streamed = client.stream(PROMPT, 24)
    assert streamed.num_tokens == 24
    assert streamed.tokens_per_s > 0
    assert streamed.first_token_s > 0
    assert streamed.text.startswith(client.complete(PROMPT, 12))


def test_logprobs_are_those_of_transformers(server: VllmServer, model_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokens = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.inference_mode():
        expected = model(tokens).logits[0, -1].log_softmax(-1).max().item()
    assert Client(server).token_logprobs(PROMPT, 1)[0] == pytest.approx(expected, abs=0.1)


def test_perplexity_is_that_of_transformers(server: VllmServer, model_dir: Path):
    text = (model_dir / "heldout.txt").read_text()
    measured = Client(server).perplexity(text, max_tokens=500)
    assert (measured.window, measured.stride, measured.tokens_scored) == (95, 47, 499)

    tokens = AutoTokenizer.from_pretrained(model_dir)(text, add_special_tokens=False).input_ids[:500]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    total = 0.0
    for start in range(0, 500 - 48, 47):
        window = torch.tensor(tokens[start : start + 95])
        with torch.inference_mode():
            logprobs = model(window[None, :-1]).logits[0].log_softmax(-1)
        scored = logprobs.gather(1, window[1:, None])[:, 0]
        total += scored[0 if start == 0 else 47 :].sum().item()
    # bf16 against fp32, over 499 tokens.
    assert measured.value == pytest.approx(math.exp(-total / 499), rel=0.01)


def test_resident_bytes_of_plain_experts(server: VllmServer):
    layers = server.resident_expert_bytes()
    assert len(layers) == CONFIG.num_layers
    expected = CONFIG.num_experts * 3 * CONFIG.intermediate_size * CONFIG.hidden_size * 2
    assert set(layers.values()) == {expected}
    assert server.peak_rss_bytes > 100e6
    assert server.weight_load_s is not None


def test_dying_vllm_is_told_with_its_reason(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(ServerError, match="no_such_model"), VllmServer(tmp_path):
        pass


def test_rows_of_the_serve_benchmark(server: VllmServer):
    options = ["--rates", "inf", "--num-prompts", "2", "--input-len", "8", "--output-len", "8"]
    rows = serve.measure("tiny", server, serve.parse(options), Console(quiet=True))
    values = {row.context["metric"]: row.value for row in rows}
    assert len(values) == len(rows)
    assert values["output at all at once"] > 0
    assert values["peak memory of the server's processes"] > 100
    assert values["experts resident in the server"] == values["experts on disk"]
    assert {row.context["model"] for row in rows} == {"tiny"}
