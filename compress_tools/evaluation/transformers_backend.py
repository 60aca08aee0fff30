"""Predictions through transformers: the truth, and the whole vocabulary at any size. Dense or factored experts."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from compress_tools.errors import CheckpointError, UnsupportedArchitectureError
from compress_tools.evaluation.predictions import Predictions
from compress_tools.evaluation.windows import Window
from compress_tools.text_file import in_words


def predict(
    path: str,
    windows: Sequence[Window],
    dtype: str,
    device: str,
    *,
    whole: bool,
    top_k: int | None,  # noqa: ARG001 - vLLM's
    **loading: bool,
) -> Iterator[Predictions]:
    """Load a model and yield one window's predictions after the other.

    Args:
        path: checkpoint, dense or ResMoE.
        windows: what is scored.
        dtype: dtype of weights and arithmetic; log-probabilities are taken in fp32.
        device: torch device.
        whole: give whole distributions, not the targets' alone.
        top_k: not used: distributions are over the whole vocabulary.
        loading: of ``from_pretrained``.
    Raises:
        UnsupportedArchitectureError: transformers has no class for it.
    """
    from transformers import AutoModelForCausalLM

    from compress_tools.hf.quantizer import register

    register()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), **loading)
    except ValueError as err:
        words = in_words(err).replace("`trust_remote_code=True`", "--trust-remote-code")
        why = f"{path}: transformers can't load it: {words}"
        raise UnsupportedArchitectureError(f"{why}; try --backend vllm") from err
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError) as err:
        why = f"{path}: transformers can't load it: {in_words(err)}"
        raise CheckpointError(f"{why}; do config.json and weights match?") from err
    model.to(device).eval()
    return predict_windows(model, windows, whole=whole)


@torch.inference_mode()
def predict_windows(model: nn.Module, windows: Sequence[Window], *, whole: bool) -> Iterator[Predictions]:
    """Yield a loaded model's predictions, on the CPU."""
    device = next(model.parameters()).device
    for window in windows:
        logits = model(input_ids=window.tokens[None].to(device), use_cache=False).logits
        logprobs = logits[0, window.first - 1 : -1].float().log_softmax(dim=1)  # [N, V]
        targets = logprobs.gather(1, window.targets[:, None].to(device))[:, 0]
        yield Predictions(targets.cpu(), logprobs.cpu() if whole else None)
