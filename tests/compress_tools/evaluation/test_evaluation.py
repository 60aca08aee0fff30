"""`resmoe eval`: windows, the two distances by law, both backends on one text, and every refusal."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from compress_tools.cli.commands import cli
from compress_tools.errors import CheckpointError, ConfigError, ResMoEError, UnsupportedArchitectureError
from compress_tools.evaluation import perplexity, tasks
from compress_tools.evaluation.config import make_tasks_config, make_text_config
from compress_tools.evaluation.perplexity import evaluate
from compress_tools.evaluation.predictions import Predictions, Scores, kl_divergence
from compress_tools.evaluation.source import choose_window, stored_dtype
from compress_tools.evaluation.windows import cut_windows

TEXT_TOKENS = 150


def options(trained: tuple[Path, Path], **others: object) -> dict[str, object]:
    return {"text": str(trained[0] / "heldout.txt"), "max_tokens": TEXT_TOKENS, **others}


@pytest.mark.parametrize(
    ("length", "window", "stride"),
    [(2, 2, 1), (10, 4, 4), (10, 4, 1), (10, 4, 3), (9, 20, 5), (17, 8, 4), (16, 8, 8)],
    ids=lambda size: str(size),
)
def test_each_token_is_scored_once_with_enough_before_it(length: int, window: int, stride: int) -> None:
    tokens = torch.arange(length)
    windows = cut_windows(tokens, window, stride)
    assert torch.cat([one.targets for one in windows]).tolist() == list(range(1, length))
    assert all(2 <= len(one.tokens) <= window and one.first >= 1 for one in windows)
    assert all(one.first >= max(1, window - stride) for one in windows[1:])


def predictions(logits: Tensor, top_k: int | None = None) -> Predictions:
    logprobs = logits.log_softmax(dim=1)
    if top_k is None:
        return Predictions(logprobs[:, 0], logprobs)
    best = logprobs.topk(top_k)
    return Predictions(logprobs[:, 0], best.values, best.indices)


def test_divergence_by_law() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(7, 30, generator=generator) for _ in range(2))
    assert torch.allclose(kl_divergence(predictions(one), predictions(one)), torch.zeros(7, dtype=torch.float64))
    exact = kl_divergence(predictions(one), predictions(two))
    by_torch = torch.nn.functional.kl_div(two.log_softmax(1), one.log_softmax(1), reduction="none", log_target=True)
    assert torch.allclose(exact, by_torch.sum(1).double(), atol=1e-6)
    bounds = [kl_divergence(predictions(one, k), predictions(two, k)) for k in (1, 5, 15, 30)]
    assert all((bound >= -1e-7).all() and (bound <= exact + 1e-6).all() for bound in bounds)
    assert torch.allclose(bounds[-1], exact, atol=1e-5)  # K = V: nothing is left for the bucket
    assert torch.equal(predictions(one, 5).best(), predictions(one).best())
    with pytest.raises(ValueError, match="whole vocabulary"):
        kl_divergence(predictions(one), predictions(two, 3))


def test_scores_are_means_over_positions() -> None:
    uniform = Predictions(torch.full((3,), -math.log(8)), torch.full((3, 8), -math.log(8)))
    scores = Scores()
    scores.add(uniform, uniform)
    scores.add(
        Predictions(torch.full((1,), -math.log(2)), uniform.logprobs[:1]),
        Predictions(uniform.target_logprobs[:1], uniform.logprobs[:1]),
    )
    assert scores.positions == 4
    assert scores.perplexity == pytest.approx(math.exp((3 * math.log(8) + math.log(2)) / 4))
    assert (scores.mean_kl, scores.top1_agreement) == (pytest.approx(0, abs=1e-7), 1)


def test_against_itself_and_against_the_original(trained) -> None:
    original, small = map(str, trained)
    same = evaluate(original, make_text_config(**options(trained, against=original)))
    assert same.kl_nats == pytest.approx(0, abs=1e-9)
    assert same.top1_agreement == 1
    assert same.perplexity == same.original_perplexity
    assert (same.tokens_scored, same.window, same.stride, same.dtype) == (TEXT_TOKENS - 1, 31, 15, "float32")
    other = evaluate(small, make_text_config(**options(trained, against=original)))
    assert other.original_perplexity == same.perplexity
    assert 1e-5 < other.kl_nats < other.kl_p99_nats <= other.kl_max_nats
    assert other.kl_over == "whole vocabulary"
    alone = evaluate(small, make_text_config(**options(trained)))
    assert (alone.perplexity, alone.kl_nats, alone.against) == (other.perplexity, None, None)


OWN_CODE = """
from transformers import MixtralConfig, MixtralForCausalLM


class OwnConfig(MixtralConfig):
    model_type = "own_mixtral"


class OwnForCausalLM(MixtralForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_code_of_its_own(trained, tmp_path, monkeypatch) -> None:
    from transformers import AutoModelForCausalLM, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = shutil.copytree(trained[0], tmp_path / "own")
    # transformers renames Mixtral's tensors by its model_type; under another one they have its own names.
    dense = AutoModelForCausalLM.from_pretrained(trained[0], dtype=torch.float32)
    dense.save_pretrained(own, save_original_format=False)
    (own / "own_code.py").write_text(OWN_CODE)
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "own_mixtral", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(ResMoEError, match="--trust-remote-code"):
        evaluate(str(own), make_text_config(**options(trained)))
    trusted = evaluate(str(own), make_text_config(**options(trained, trust_remote_code=True)))
    assert trusted.perplexity == evaluate(str(trained[0]), make_text_config(**options(trained))).perplexity


def test_perplexity_is_transformers_own_loss(trained) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    original = str(trained[0])
    text = Path(original, "heldout.txt").read_text()
    ids = AutoTokenizer.from_pretrained(original)(text, add_special_tokens=False)["input_ids"][:31]
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
    found = evaluate(original, make_text_config(**options(trained) | {"max_tokens": 31}))
    assert found.perplexity == pytest.approx(loss.exp().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "/no/such/file"}, "--text"),
        ({"window": 32}, "at most 31"),
        ({"window": 8, "stride": 9}, "leaves out tokens"),
        ({"stride": 32}, "leaves out tokens"),
        ({"top_k": 4}, "no effect"),
        ({"backend": "vllm", "device": "cuda"}, "takes its own"),
        ({"backend": "ollama"}, "--backend"),
        ({"max_tokens": 1}, "--max-tokens"),
        ({"device": "abacus"}, "not a device"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refused_requests(trained, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(str(trained[0]), make_text_config(**options(trained) | changes))


def test_refused_models_and_texts(trained, tiny_mixtral, tmp_path, monkeypatch) -> None:
    original, text = str(trained[0]), tmp_path / "text.txt"
    text.write_text("a")
    with pytest.raises(ConfigError, match="1 tokens; at least 2"):
        evaluate(original, make_text_config(text=str(text)))
    text.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        evaluate(original, make_text_config(text=str(text)))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        evaluate(str(tiny_mixtral), make_text_config(**options(trained)))
    with pytest.raises(ConfigError, match="384 in"):
        evaluate(original, make_text_config(**options(trained, against=str(tiny_mixtral))))
    shutil.copytree(original, tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer"):
        evaluate(str(tmp_path / "damaged"), make_text_config(**options(trained)))
    with pytest.raises(CheckpointError, match="no such directory"):
        evaluate(str(tmp_path / "none"), make_text_config(**options(trained)))
    config = tmp_path / "damaged" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"is_encoder_decoder": True}))
    with pytest.raises(UnsupportedArchitectureError, match="decoder-only"):
        evaluate(str(tmp_path / "damaged"), make_text_config(**options(trained)))
    monkeypatch.setattr(perplexity, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        evaluate(original, make_text_config(**options(trained, backend="vllm")))


def test_window_and_dtype_defaults() -> None:
    assert choose_window(None, None, {"max_position_embeddings": 4096}) == (1024, 512)
    assert choose_window(None, 100, {"max_position_embeddings": 256}) == (255, 100)
    assert choose_window(2, None, {}) == (2, 1)
    assert stored_dtype("auto", {"torch_dtype": "float16"}) == "float16"
    assert stored_dtype("bfloat16", {"dtype": "float32"}) == "bfloat16"


def test_tasks_need_lm_eval_and_vllm(trained, monkeypatch) -> None:
    config = make_tasks_config(tasks="arc_easy")
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="lm-eval is not installed; pip install"):
        tasks.run_tasks(str(trained[0]), config)
    monkeypatch.setattr(tasks, "find_spec", lambda name: name == "lm_eval" or None)
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        tasks.run_tasks(str(trained[0]), config)
    monkeypatch.setattr(tasks, "find_spec", lambda name: True)
    with pytest.raises(ConfigError, match="no such directory"):
        tasks.run_tasks(str(trained[0]), make_tasks_config(tasks="mine", include_path="/no/such"))
    with pytest.raises(ConfigError, match="--tasks"):
        make_tasks_config(tasks=" , ")


def test_command(trained) -> None:
    original, small = map(str, trained)
    words = ["eval", small, "--text", f"{original}/heldout.txt", "--max-tokens", "60", "--against", original]
    done = CliRunner().invoke(cli, [*words, "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["tokens_scored"] == 59
    shown = CliRunner().invoke(cli, words, catch_exceptions=False).stdout
    assert all(
        word in shown
        for word in ("perplexity", "mean KL, nats", "99th percentile", "maximum", "window 31, stride 15", "float32")
    )
    for wrong in (["eval", small], ["eval", small, "--text", "x", "--tasks", "y"], [*words, "--limit", "3"]):
        with pytest.raises(ConfigError):
            CliRunner().invoke(cli, wrong, catch_exceptions=False)
