"""Distances and means by hand-made positions, windows and defaults at their limits."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.evaluation import perplexity
from compress_tools.evaluation.config import TextConfig, make_tasks_config, make_text_config, one_kind
from compress_tools.evaluation.perplexity import evaluate
from compress_tools.evaluation.predictions import Predictions, Scores, kl_divergence
from compress_tools.evaluation.source import choose_window, read_model_config, read_tokens, stored_dtype, vllm_errors
from compress_tools.evaluation.transformers_backend import predict_windows
from compress_tools.evaluation.windows import cut_windows


def of_probabilities(rows: list[list[float]], targets: list[int]) -> Predictions:
    logprobs = torch.tensor(rows).log()
    return Predictions(logprobs.gather(1, torch.tensor(targets)[:, None])[:, 0], logprobs)


# Two positions over three tokens: both models agree at the first on token 1, and differ at the second.
ORIGINAL = of_probabilities([[0.2, 0.7, 0.1], [0.5, 0.25, 0.25]], [1, 0])
OTHER = of_probabilities([[0.3, 0.6, 0.1], [0.25, 0.5, 0.25]], [1, 0])
KL = (0.2 * math.log(2 / 3) + 0.7 * math.log(7 / 6), 0.5 * math.log(2) + 0.25 * math.log(0.5))


def test_two_positions_by_hand() -> None:
    scores = Scores()
    scores.add(OTHER, ORIGINAL)
    assert scores.positions == 2
    assert scores.perplexity == pytest.approx(math.exp(-(math.log(0.6) + math.log(0.25)) / 2))
    assert scores.original_perplexity == pytest.approx(math.exp(-(math.log(0.7) + math.log(0.5)) / 2))
    assert scores.mean_kl == pytest.approx(sum(KL) / 2, abs=1e-7)
    assert scores.top1_agreement == 0.5


def test_windows_add_up() -> None:
    whole, parts = Scores(), Scores()
    whole.add(OTHER, ORIGINAL)
    for position in range(2):
        one, two = (
            Predictions(p.target_logprobs[position : position + 1], p.logprobs[position : position + 1])
            for p in (OTHER, ORIGINAL)
        )
        parts.add(one, two)
    for name in ("positions", "perplexity", "original_perplexity", "mean_kl", "top1_agreement"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name))


def test_without_an_original_only_the_loss_is_counted() -> None:
    scores = Scores()
    scores.add(Predictions(OTHER.target_logprobs))
    assert (scores.positions, scores.original_loss, scores.kl, scores.agreed) == (2, 0, 0, 0)
    assert scores.perplexity == pytest.approx(math.exp(-(math.log(0.6) + math.log(0.25)) / 2))


def listed(rows: list[dict[int, float]]) -> Predictions:
    ids = torch.tensor([list(row) for row in rows])
    logprobs = torch.tensor([list(row.values()) for row in rows]).log()
    return Predictions(logprobs[:, 0], logprobs, ids)


def test_divergence_over_lists_by_hand() -> None:
    """Tokens 7 and 2 are in both lists, in another order; 5 and 9 join all others."""
    original = listed([{7: 0.5, 2: 0.2, 5: 0.1}])
    other = listed([{9: 0.3, 2: 0.3, 7: 0.25}])
    expected = 0.5 * math.log(2) + 0.2 * math.log(2 / 3) + 0.3 * math.log(0.3 / 0.45)
    assert kl_divergence(original, other).tolist() == pytest.approx([expected], abs=1e-6)


def test_divergence_over_lists_without_a_common_token_is_none() -> None:
    assert kl_divergence(listed([{1: 0.9, 2: 0.05}]), listed([{3: 0.9, 4: 0.05}])).tolist() == [0.0]


def test_a_list_that_holds_nearly_all_has_a_rest_of_rounding_only() -> None:
    """The rest would be 0 against 0.1: bounded, never infinite."""
    found = kl_divergence(listed([{1: 0.5, 2: 0.4}]), listed([{2: 0.25, 1: 0.75}])).item()
    assert math.isfinite(found)
    assert found == pytest.approx(0.5 * math.log(2 / 3) + 0.4 * math.log(1.6) + 0.1 * math.log(0.1 / 1e-9), rel=1e-3)


def test_the_most_probable_of_a_list_is_a_token_not_a_place() -> None:
    assert listed([{7: 0.2, 3: 0.5}, {1: 0.6, 9: 0.3}]).best().tolist() == [3, 1]


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (10, 4, 2, [(0, 4, 1), (2, 6, 2), (4, 8, 2), (6, 10, 2)]),
        (10, 4, 4, [(0, 4, 1), (3, 7, 1), (6, 10, 1)]),
        (9, 4, 3, [(0, 4, 1), (3, 7, 1), (6, 9, 1)]),
        (5, 10, 5, [(0, 5, 1)]),
        (2, 2, 2, [(0, 2, 1)]),
        (3, 2, 2, [(0, 2, 1), (1, 3, 1)]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_windows_exactly(length: int, window: int, stride: int, expected: list[tuple[int, int, int]]) -> None:
    found = cut_windows(torch.arange(length), window, stride)
    assert [(int(w.tokens[0]), int(w.tokens[-1]) + 1, w.first) for w in found] == expected


class _Shifted(torch.nn.Module):
    """A model whose most probable next token is the present one plus 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert input_ids.shape[0] == 1
        assert not use_cache
        return SimpleNamespace(logits=5 * torch.nn.functional.one_hot((input_ids + 1) % 20, 20).half())


def test_a_position_is_predicted_by_the_one_before_it() -> None:
    windows = cut_windows(torch.arange(11), 5, 3)
    whole = list(predict_windows(_Shifted(), windows, whole=True))
    expected = 5 - math.log(math.exp(5) + 19)
    assert [len(one.target_logprobs) for one in whole] == [4, 3, 3]
    for found, window in zip(whole, windows, strict=True):
        assert found.best().tolist() == window.targets.tolist()
        assert found.target_logprobs.tolist() == pytest.approx([expected] * len(window.targets))
        assert found.logprobs.dtype == torch.float32
    assert all(one.logprobs is None for one in predict_windows(_Shifted(), windows, whole=False))


@pytest.mark.parametrize(
    ("window", "stride", "config", "expected"),
    [
        (255, None, {"max_position_embeddings": 256}, (255, 127)),
        (None, None, {"n_positions": 11}, (10, 5)),
        (None, None, {"max_seq_len": 2}, (1, 1)),
        (None, None, {"max_position_embeddings": None, "n_positions": 21}, (20, 10)),
        (None, None, {"max_position_embeddings": 1025}, (1024, 512)),
        (None, None, {"max_position_embeddings": 1024}, (1023, 511)),
        (None, None, {}, (1024, 512)),
        (7, 7, {}, (7, 7)),
        (9, 2, {}, (9, 2)),
    ],
)
def test_windows_fit_the_model(window: int | None, stride: int | None, config: dict, expected: tuple) -> None:
    assert choose_window(window, stride, config) == expected


def test_windows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 255"):
        choose_window(256, None, {"max_position_embeddings": 256})
    with pytest.raises(ConfigError, match="--stride 8 leaves out tokens between windows of 7"):
        choose_window(7, 8, {})


@pytest.mark.parametrize(
    ("backend", "top_k", "vocabulary", "expected"),
    [
        ("transformers", None, 10**6, None),
        ("vllm", None, 8192, None),
        ("vllm", None, 8193, 256),
        ("vllm", 5, 100, 5),
        ("vllm", 99, 100, 99),
        ("vllm", 100, 100, None),
        ("vllm", 5, 10**6, 5),
    ],
)
def test_how_many_tokens_are_compared(backend: str, top_k: int | None, vocabulary: int, expected: int | None) -> None:
    config = TextConfig(text="t", against="a", backend=backend, top_k=top_k)
    assert perplexity._top_k(config, vocabulary) == expected


@pytest.mark.parametrize(
    "accepted",
    [
        {"window": 2, "stride": 2},
        {"window": 8, "stride": 8},
        {"stride": 1},
        {"max_tokens": 2},
        {"top_k": 1, "against": "a", "backend": "vllm"},
        {"backend": "vllm"},
    ],
    ids=str,
)
def test_requests_at_their_limits(accepted: dict) -> None:
    assert make_text_config(text="t", **accepted).model_dump(exclude_defaults=True).items() >= accepted.items()


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ({"window": 1}, "--window"),
        ({"stride": 0}, "--stride"),
        ({"max_tokens": 1}, "--max-tokens"),
        ({"top_k": 0, "against": "a", "backend": "vllm"}, "--top-k"),
        ({"top_k": 1, "against": "a"}, "--top-k 1 has no effect"),
        ({"top_k": 1, "backend": "vllm"}, "--top-k 1 has no effect"),
        ({"window": 8, "stride": 9}, "leaves out tokens"),
        ({"dtype": "int8"}, "--dtype"),
    ],
    ids=str,
)
def test_requests_beyond_them(refused: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_text_config(text="t", **refused)


def test_names_of_tasks() -> None:
    assert make_tasks_config(tasks=" one, two ,,three", limit=1).names == ["one", "two", "three"]
    for options in ({"tasks": ""}, {"tasks": ","}, {"tasks": "one", "limit": 0}):
        with pytest.raises(ConfigError, match=r"--(tasks|limit)"):
            make_tasks_config(**options)


def test_a_text_or_tasks() -> None:
    assert one_kind(["text", "window", "dtype"]) == "text"
    assert one_kind(["tasks", "limit", "dtype"]) == "tasks"
    for given in ([], ["dtype"], ["text", "tasks"]):
        with pytest.raises(ConfigError, match="give one of --text FILE"):
            one_kind(given)
    with pytest.raises(ConfigError, match="--limit has no effect with --text"):
        one_kind(["text", "limit"])
    with pytest.raises(ConfigError, match="--max-tokens has no effect with --tasks"):
        one_kind(["tasks", "max_tokens"])


def test_stored_dtypes() -> None:
    assert stored_dtype("auto", {"dtype": "bfloat16", "torch_dtype": "float16"}) == "bfloat16"
    assert stored_dtype("auto", {"dtype": None}) == "float32"
    assert stored_dtype("float16", {"dtype": "bfloat16"}) == "float16"


def test_what_stops_vllm_is_one_sentence() -> None:
    with pytest.raises(CheckpointError, match="m: vLLM could not run it: no memory;") as caught, vllm_errors("m"):
        raise RuntimeError("no memory")
    assert isinstance(caught.value.__cause__, RuntimeError)
    with vllm_errors("m"):
        pass


def copied(source: Path, path: Path, **changes: object) -> Path:
    """A checkpoint of links with another config.json."""
    path.mkdir()
    for file in source.iterdir():
        if file.name != "config.json":
            (path / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return path


def test_the_language_model_of_a_larger_one_counts(trained, tmp_path) -> None:
    nested = copied(trained[0], tmp_path / "nested", vocab_size=None, text_config={"vocab_size": 77, "n_positions": 9})
    assert read_model_config(str(nested))["vocab_size"] == 77
    assert choose_window(None, None, {"n_positions": 9}) == (8, 4)
    with pytest.raises(CheckpointError, match="vocab_size is None, expected a positive whole number"):
        read_model_config(str(copied(trained[0], tmp_path / "none", vocab_size=None)))


def test_tokens_are_the_texts_own_up_to_the_limit(trained, tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog", encoding="utf-8")
    everything = read_tokens(str(trained[0]), str(text), None)
    assert everything.dtype == torch.int64
    assert len(everything) > 4
    for count in (2, len(everything) - 1, len(everything), len(everything) + 5):
        assert torch.equal(read_tokens(str(trained[0]), str(text), count), everything[:count])


def test_a_vocabulary_that_the_tokenizer_exceeds_is_refused(trained, tmp_path) -> None:
    """The largest token may be the vocabulary's last, no more."""
    text = str(trained[0] / "heldout.txt")
    largest = int(read_tokens(str(trained[0]), text, 60).max())
    short = copied(trained[0], tmp_path / "short", vocab_size=largest)
    with pytest.raises(ConfigError, match=f"makes token {largest}, its vocabulary ends at {largest}"):
        evaluate(str(short), make_text_config(text=text, max_tokens=60))


def test_numbers_of_an_evaluation_are_the_windows_own(trained, monkeypatch) -> None:
    """Fields of the result against predictions that are made up here, token by token."""
    calls = []

    def predict(path, windows, dtype, device, whole, top_k):
        calls.append((path, dtype, device, whole, top_k))
        scale = 2.0 if path == "original" else 1.0
        for window in windows:
            logits = scale * torch.nn.functional.one_hot(window.targets % 3, 4).float()
            logprobs = logits.log_softmax(1)
            yield Predictions(logprobs[:, 0], logprobs if whole else None)

    config = {"vocab_size": 10**4, "n_positions": 9, "dtype": "float16"}
    monkeypatch.setattr(perplexity, "read_model_config", lambda path: config)
    monkeypatch.setattr(perplexity, "read_tokens", lambda *_: torch.arange(20))
    monkeypatch.setattr(perplexity, "import_module", lambda name: SimpleNamespace(predict=predict))
    found = evaluate("model", make_text_config(text="t", against="original", window=8, stride=8))
    assert calls == [("original", "float16", "cpu", True, None), ("model", "float16", "cpu", True, None)]
    assert (found.tokens_scored, found.window, found.stride, found.dtype) == (19, 8, 7, "float16")
    assert (found.model, found.text, found.against, found.backend) == ("model", "t", "original", "transformers")
    targets = [number % 3 for number in range(1, 20)]
    for name, scale in (("perplexity", 1.0), ("original_perplexity", 2.0)):
        norm = math.log(math.exp(scale) + 3)
        loss = sum(norm - (scale if target == 0 else 0) for target in targets) / 19
        assert getattr(found, name) == pytest.approx(math.exp(loss))
    share, rest = math.exp(2) / (math.exp(2) + 3), 1 / (math.exp(2) + 3)
    apart = math.log(math.exp(1) + 3) - math.log(math.exp(2) + 3)
    assert found.kl_nats == pytest.approx(share * (1 + apart) + 3 * rest * apart, abs=1e-6)
    assert (found.kl_p99_nats, found.kl_max_nats) == (pytest.approx(found.kl_nats, abs=1e-6),) * 2  # all alike
    assert (found.top1_agreement, found.kl_over) == (1.0, "whole vocabulary")
    calls.clear()
    alone = evaluate("model", make_text_config(text="t"))
    assert calls == [("model", "float16", "cpu", False, None)]
    assert (alone.kl_nats, alone.kl_over, alone.top1_agreement, alone.original_perplexity) == (None,) * 4
    assert (alone.kl_p99_nats, alone.kl_max_nats) == (None, None)
    monkeypatch.setattr(perplexity, "find_spec", lambda name: object())
    lists = evaluate("model", make_text_config(text="t", against="original", backend="vllm", top_k=7))
    assert lists.kl_over == "7 most probable tokens and the rest: a lower bound"
    assert calls[-1] == ("model", "float16", "cpu", True, 7)
