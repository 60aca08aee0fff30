"""What both backends are given: the text as tokens, the models' configs, dtype, context."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from compress_tools.errors import CheckpointError, ConfigError, UnsupportedArchitectureError
from compress_tools.evaluation.config import DType
from compress_tools.source.reader import CheckpointReader
from compress_tools.text_file import in_words, read_text

DEFAULT_WINDOW = 1024
_DTYPES = ("dtype", "torch_dtype")
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


def read_model_config(path: str) -> dict[str, Any]:
    """The language model's part of a checkpoint's config.json.

    Raises:
        CheckpointError: not a readable checkpoint.
        UnsupportedArchitectureError: an encoder-decoder, which does not predict a text's next token.
    """
    return language_config(path, CheckpointReader(path).config)


def language_config(path: str, config: dict[str, Any]) -> dict[str, Any]:
    """The same of a config.json that has been read.

    Raises:
        CheckpointError, UnsupportedArchitectureError: see ``read_model_config``.
    """
    if config.get("is_encoder_decoder"):
        raise UnsupportedArchitectureError(
            f"{path}: {config.get('model_type')} is an encoder-decoder; a text's perplexity needs a decoder-only model"
        )
    config = {**config, **(config.get("text_config") or {})}
    for name in ("vocab_size", *_CONTEXT):
        value = config.get(name)
        if (value is not None or name == "vocab_size") and not _is_count(value):
            raise CheckpointError(f"{path}: config.json: {name} is {value!r:.60}, expected a positive whole number")
    for name in _DTYPES:
        if config.get(name) is not None and config[name] not in get_args(DType)[1:]:
            raise CheckpointError(
                f"{path}: config.json: {name} is {config[name]!r:.60}, expected one of {', '.join(get_args(DType)[1:])}"
            )
    return config


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def read_tokens(model: str, text: str, max_tokens: int | None, **loading: bool) -> Tensor:
    """A text file in the model's tokens, ``[N]`` int64; no special token is added.

    Args:
        model: checkpoint.
        text: the file.
        max_tokens: the first of them alone; None: all.
        loading: of ``from_pretrained``, see ``loading_options``.
    Raises:
        CheckpointError: no tokenizer beside the weights, or none that transformers can load.
        ConfigError: the text is missing, not UTF-8, or shorter than two tokens.
    """
    content = read_text(text, ConfigError, f"--text {text}", may_be_piped=True)
    ids = load_tokenizer(model, **loading)(content, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor(ids, dtype=torch.int64)[:max_tokens]
    if len(tokens) < 2:
        raise ConfigError(f"--text {text}: {len(tokens)} tokens; at least 2 are needed, one to predict the next")
    return tokens


def load_tokenizer(model: str, **loading: bool) -> Any:
    """A checkpoint's tokenizer.

    Args:
        model: checkpoint.
        loading: of ``from_pretrained``, see ``loading_options``.
    Raises:
        CheckpointError: no tokenizer beside the weights, or none that transformers can load.
    """
    if not any((Path(model) / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{model}: no tokenizer beside the weights; expected tokenizer.json or tokenizer.model, as in the original"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, **loading)
    # The tokenizers library raises Exception itself for files that it can't read.
    except Exception as err:
        # transformers names its own argument.
        why = in_words(err).replace("`trust_remote_code=True`", "--trust-remote-code")
        raise CheckpointError(f"{model}: transformers can't load its tokenizer: {why}") from err


def loading_options(*, trust_remote_code: bool) -> dict[str, bool]:
    """What loaders of models and tokenizers are told; nothing where nothing is asked."""
    return {"trust_remote_code": True} if trust_remote_code else {}


def choose_window(window: int | None, stride: int | None, config: dict[str, Any]) -> tuple[int, int]:
    """The (window, stride) to use.

    vLLM generates one token after whatever it scores, hence one less than the model's context, for both backends.

    Raises:
        ConfigError: the window exceeds what the model can take, or the stride the window.
    """
    context = next((config[name] for name in _CONTEXT if config.get(name)), None)
    limit = None if context is None else context - 1
    if window is None:
        window = min(DEFAULT_WINDOW, limit or DEFAULT_WINDOW)
    elif limit is not None and window > limit:
        raise ConfigError(f"--window {window}: the model's context is {context} tokens; ask for at most {limit}")
    stride = stride or max(1, window // 2)
    if stride > window:
        raise ConfigError(f"--stride {stride} leaves out tokens between windows of {window}")
    return window, stride


def stored_dtype(dtype: str, config: dict[str, Any]) -> str:
    """``auto`` as the dtype that config.json names; any other as it is."""
    return dtype if dtype != "auto" else str(next((config[name] for name in _DTYPES if config.get(name)), "float32"))


@contextmanager
def vllm_errors(model: str) -> Iterator[None]:
    """What stops vLLM, as a CheckpointError in one sentence; vLLM has logged the rest."""
    try:
        yield
    except (RuntimeError, ValueError) as err:
        raise CheckpointError(
            f"{model}: vLLM could not run it: {in_words(err)}; its own log is above. On a CPU "
            "VLLM_CPU_KVCACHE_SPACE=4 (GiB) keeps it from taking nearly all memory"
        ) from err
