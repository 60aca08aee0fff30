"""A head start: embedding and output head fitted to the text's bigram counts, all of them at once."""

import time

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.models.reference_models.train import PhaseResult, ProgressCallback

PEAK_LR = 0.02
# The norm before every use of it hides the embedding's scale, but the layers' outputs add to it at this one:
# at 0.1 to 0.3 fresh layers drown what the bigrams taught (measured), 1 and 2 do alike.
EMBEDDING_RMS = 1.0


def bigram_counts(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often token j follows token i: float32 [V, V], from ids [N]."""
    pairs = tokens[:-1] * vocab_size + tokens[1:]
    return torch.bincount(pairs, minlength=vocab_size**2).view(vocab_size, vocab_size).float()


def fit_bigrams(
    model: PreTrainedModel, tokens: Tensor, steps: int, progress: ProgressCallback | None = None
) -> PhaseResult:
    """Fit the model without its layers (embedding, norm, head) to the training bigrams, in place.

    A step sees every bigram of the text through the [V, V] counts, so it costs three products [V, H, V]
    whatever the length of the text: the cheapest part of a language model to learn, and the slowest one to
    learn from small batches.

    Args:
        model: fresh model on the CPU, float32.
        tokens: training ids [N] int64.
        steps: full-batch Adam steps, at least 1; the learning rate falls linearly from PEAK_LR.
        progress: called after every step; silent if None.
    Returns:
        Every step's loss over the whole text, in nats per token, and the wall time.
    """
    started = time.perf_counter()
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight  # [V, H] each
    counts = bigram_counts(tokens, len(embedding))
    counts /= counts.sum()
    first = counts.sum(dim=1)  # [V]
    optimizer = torch.optim.Adam([embedding, head], lr=PEAK_LR, betas=(0.9, 0.95))
    losses: list[float] = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = PEAK_LR * (1 - step / steps)
        logits = model.model.norm(embedding) @ head.T  # [V, V]
        loss = first @ logits.logsumexp(dim=1) - (counts * logits).sum()
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if progress:
            progress("bigrams", step + 1, steps, f"loss {losses[-1]:.2f}")
    with torch.no_grad():
        embedding *= EMBEDDING_RMS / embedding.square().mean(dim=1, keepdim=True).sqrt()
    return PhaseResult(tuple(losses), time.perf_counter() - started)
