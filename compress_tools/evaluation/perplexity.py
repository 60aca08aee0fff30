"""`resmoe eval MODEL --text FILE`: perplexity, and the distance from the original's predictions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

from compress_tools.errors import ConfigError
from compress_tools.evaluation.config import TextConfig
from compress_tools.evaluation.predictions import Predictions, Scores
from compress_tools.evaluation.source import (
    choose_window,
    loading_options,
    read_model_config,
    read_tokens,
    stored_dtype,
)
from compress_tools.evaluation.windows import Window, cut_windows
from compress_tools.progress.listener import ProgressListener, Silent

# A backend is a module with one function, `predict`. vLLM's lies with the plugin: nothing here imports vLLM.
BACKENDS = {"transformers": "compress_tools.evaluation.transformers_backend", "vllm": "resmoe_vllm.evaluation"}
WHOLE_VOCABULARY_LIMIT = 8192
DEFAULT_TOP_K = 256


class Predict(Protocol):
    """A backend's function."""

    def __call__(
        self,
        path: str,
        windows: Sequence[Window],
        dtype: str,
        device: str,
        *,
        whole: bool,
        top_k: int | None,
        **loading: bool,
    ) -> Iterable[Predictions]:
        """One window's predictions after the other."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """One model on one text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of ``tokens_scored`` tokens.
        tokens_scored: every token of the text but the first.
        window, stride: tokens seen at once, and from one window's begin to the next's.
        backend, dtype: what ran the models, and in which dtype.
        against: the original's path; the rest is None without one.
        original_perplexity: the original's.
        kl_nats: mean over scored positions of KL(original || model).
        kl_p99_nats: their 99th percentile by nearest rank, see ``Scores.kl_percentile``.
        kl_max_nats: their maximum.
        kl_over: ``whole vocabulary``, or what the lower bound was taken over.
        top1_agreement: share of positions where both find the same token most probable.
    """

    model: str
    text: str
    perplexity: float
    tokens_scored: int
    window: int
    stride: int
    backend: str
    dtype: str
    against: str | None = None
    original_perplexity: float | None = None
    kl_nats: float | None = None
    kl_p99_nats: float | None = None
    kl_max_nats: float | None = None
    kl_over: str | None = None
    top1_agreement: float | None = None


def evaluate(model: str, config: TextConfig, progress: ProgressListener | None = None) -> Evaluation:
    """Score a text.

    With transformers both models are in memory at once; with vLLM one after the other.

    Args:
        model: checkpoint, dense or ResMoE.
        config: the text and how it is scored.
        progress: told of windows.
    Raises:
        ConfigError: the request does not fit the model or the text, or vLLM is not installed.
        CheckpointError, UnsupportedArchitectureError: a model can't be loaded, or has no tokenizer.
    """
    progress = progress or Silent()
    if config.backend == "vllm" and find_spec("vllm") is None:
        raise ConfigError("--backend vllm: vLLM is not installed; pip install 'resmoe[cuda]', or see docs/install.md")
    own = read_model_config(model)
    vocabulary = own["vocab_size"]
    original = read_model_config(config.against) if config.against is not None else None
    if original is not None and original["vocab_size"] != vocabulary:
        raise ConfigError(
            f"--against {config.against}: {original['vocab_size']} tokens in its vocabulary, {vocabulary} in {model}; "
            "two models are compared token by token"
        )
    window, stride = choose_window(config.window, config.stride, own)
    loading = loading_options(trust_remote_code=config.trust_remote_code)
    tokens = read_tokens(model, config.text, config.max_tokens, **loading)
    if int(tokens.max()) >= vocabulary:
        raise ConfigError(
            f"{model}: its tokenizer makes token {int(tokens.max())}, its vocabulary ends at {vocabulary}"
        )
    windows = cut_windows(tokens, window, stride)
    top_k = _top_k(config, vocabulary)
    predict: Predict = import_module(BACKENDS[config.backend]).predict

    def predictions(path: str, dtype: str) -> Iterable[Predictions]:
        progress.stage(f"{path}: {config.backend}", None)
        whole = config.against is not None
        return predict(path, windows, dtype, config.device, whole=whole, top_k=top_k, **loading)

    dtype = stored_dtype(config.dtype, own)
    originals: Iterable[Predictions | None] = [None] * len(windows)
    if original is not None and config.against is not None:
        originals = predictions(config.against, stored_dtype(config.dtype, original))
    subject = predictions(model, dtype)
    progress.stage("scoring", len(windows))
    scores = Scores()
    for theirs, ours in zip(originals, subject, strict=True):
        scores.add(ours, theirs)
        progress.step()
    found = Evaluation(
        model, config.text, scores.perplexity, scores.positions, window, min(stride, window - 1), config.backend, dtype
    )
    if original is None:
        return found
    over = "whole vocabulary" if top_k is None else f"{top_k} most probable tokens and the rest: a lower bound"
    compared = {
        "against": config.against,
        "original_perplexity": scores.original_perplexity,
        "kl_nats": scores.mean_kl,
        "kl_p99_nats": scores.kl_percentile(99),
        "kl_max_nats": scores.max_kl,
        "kl_over": over,
        "top1_agreement": scores.top1_agreement,
    }
    return Evaluation(**{**vars(found), **compared})


def _top_k(config: TextConfig, vocabulary: int) -> int | None:
    """How many tokens of each distribution vLLM is asked for; None for all of them."""
    if config.backend != "vllm":
        return None
    if config.top_k is not None:
        return None if config.top_k >= vocabulary else config.top_k
    return None if vocabulary <= WHOLE_VOCABULARY_LIMIT else DEFAULT_TOP_K
