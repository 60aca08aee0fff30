"""Predictions through vLLM, for `resmoe eval --backend vllm`: a prompt's log-probabilities, one engine at a time.

The one module here that uses more of compress_tools than its format and errors; it is imported by that command alone.
"""

import gc
import os
from collections.abc import Sequence
from dataclasses import fields
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from compress_tools.evaluation.predictions import Predictions
from compress_tools.evaluation.source import vllm_errors
from compress_tools.evaluation.windows import Window

# vLLM gives log-probabilities as Python lists, some 100 bytes an entry: 0.4 GB at a time.
_ENTRIES_AT_ONCE = 2**22


def predict(
    path: str,
    windows: Sequence[Window],
    dtype: str,
    device: str,  # noqa: ARG001  as every backend takes it
    *,
    whole: bool,
    top_k: int | None,
    **loading: bool,
) -> list[Predictions]:
    """Start vLLM on a checkpoint, score all windows, stop it.

    Args:
        path: checkpoint, dense or ResMoE.
        windows: what is scored.
        dtype: dtype of weights and arithmetic.
        device: not used: vLLM takes its own.
        whole: give distributions, not the targets' log-probabilities alone.
        top_k: of each distribution the K most probable tokens; None: the whole vocabulary.
        loading: of ``LLM``.
    Raises:
        CheckpointError: vLLM could not start.
    """
    # The command's stdout is its result; vLLM logs there unless told otherwise.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from vllm import LLM, SamplingParams

    # Windows are short: on a CPU vLLM would take nearly all memory for their cache.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    count = 0 if not whole else -1 if top_k is None else top_k
    with vllm_errors(path):
        llm = LLM(
            path,
            dtype=dtype,
            max_model_len=max(len(window.tokens) for window in windows) + 1,
            max_logprobs=count,
            # A window's tokens are not another's prefix, and cached tokens would get no log-probabilities.
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            # Prompts alone are run, each once: compiling and capturing graphs would take longer than it saves.
            enforce_eager=True,
            seed=0,
            **loading,
        )
    # One token is the least vLLM generates.
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=count, flat_logprobs=True, detokenize=False)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    entries = len(windows[0].tokens) * (vocabulary if count == -1 else count + 1)
    at_once = max(1, _ENTRIES_AT_ONCE // entries)
    found = []
    for begin in range(0, len(windows), at_once):
        part = windows[begin : begin + at_once]
        prompts = [{"prompt_token_ids": window.tokens.tolist()} for window in part]
        for window, output in zip(part, llm.generate(prompts, params, use_tqdm=False), strict=True):
            found.append(_predictions(window, output.prompt_logprobs, count, vocabulary))
    del llm
    gc.collect()
    return found


def engine_arguments() -> set[str]:
    """Names that vLLM's ``LLM`` takes, those that it hands on to its engine among them."""
    from vllm import LLM, EngineArgs

    own = set(signature(LLM.__init__).parameters) - {"self", "kwargs"}
    return own | {field.name for field in fields(EngineArgs)}


def _predictions(window: Window, flat: Any, count: int, vocabulary: int) -> Predictions:
    """VLLM's flat lists as tensors. At each position: the token that came, then the most probable, with repeats."""
    begin, end = flat.start_indices[window.first], flat.end_indices[-1]
    rows = len(window.targets)
    ids = torch.tensor(flat.token_ids[begin:end]).view(rows, -1)  # [N, 1 + K]
    logprobs = torch.tensor(flat.logprobs[begin:end], dtype=torch.float32).view(rows, -1)
    _check_targets(ids[:, 0], window.targets)
    if count == 0:
        return Predictions(logprobs[:, 0])
    if count == -1:
        dense = torch.full((rows, vocabulary), float("-inf")).scatter_(1, ids, logprobs)
        return Predictions(logprobs[:, 0], dense)
    return Predictions(logprobs[:, 0], logprobs[:, 1:], ids[:, 1:])


def _check_targets(first: Tensor, targets: Tensor) -> None:
    if not torch.equal(first, targets):
        raise RuntimeError("vLLM's prompt log-probabilities do not begin with the token that came")
