"""One training phase and the held-out perplexity."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.models.reference_models.config import ReferenceModelConfig

# (phase name, steps done, steps in all, one short word on the state)
ProgressCallback = Callable[[str, int, int, str], None]

BETAS = (0.9, 0.95)
LOSS_TAIL = 20  # a phase's final loss is the mean over this many last steps


@dataclass(frozen=True)
class Phase:
    """One training phase: its name for the progress, its steps, the highest learning rate, the batches' seed."""

    name: str
    steps: int
    peak_lr: float
    seed: int


@dataclass(frozen=True)
class PhaseResult:
    """Losses of one phase, in nats per token without the router's auxiliary loss, and its wall time."""

    losses: tuple[float, ...]
    seconds: float

    @property
    def final_loss(self) -> float:
        """Mean of the last steps' losses."""
        tail = self.losses[-LOSS_TAIL:]
        return sum(tail) / len(tail)


def window_batches(tokens: Tensor, batch_size: int, context_length: int, seed: int) -> Iterator[Tensor]:
    """Endless batches [batch_size, context_length] of token ids; every pass is a new shift and a new order.

    Raises:
        ValueError: fewer tokens than one batch needs.
    """
    num_windows = (len(tokens) - context_length) // context_length
    if num_windows < batch_size:
        raise ValueError(f"{len(tokens)} training tokens are too few for {batch_size} windows of {context_length}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        shift = int(torch.randint(context_length, (1,), generator=generator))
        windows = tokens[shift : shift + num_windows * context_length].view(num_windows, context_length)
        order = torch.randperm(num_windows, generator=generator)
        for start in range(0, num_windows - batch_size + 1, batch_size):
            yield windows[order[start : start + batch_size]]


def learning_rate(step: int, steps: int, peak: float, config: ReferenceModelConfig) -> float:
    """Linear warm-up, then a cosine from the peak to final_lr_share of it."""
    warmup = max(1, round(config.warmup_share * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return peak * (config.final_lr_share + (1 - config.final_lr_share) * cosine)


def _optimizer(model: PreTrainedModel, config: ReferenceModelConfig) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def train_phase(
    model: PreTrainedModel,
    tokens: Tensor,
    config: ReferenceModelConfig,
    phase: Phase,
    progress: ProgressCallback | None = None,
) -> PhaseResult:
    """Train in place on config.device what requires gradients: AdamW, warm-up and cosine, clipped gradients.

    Args:
        model: float32 weights; moved to the device and left there.
        tokens: training ids [N] int64.
        config: device, batch size, context length and the optimizer's settings.
        phase: what this phase does.
        progress: called after every step; silent if None.
    Raises:
        FloatingPointError: the loss is not finite.
    """
    device = torch.device(config.device)
    model.to(device).train()
    optimizer = _optimizer(model, config)
    batches = window_batches(tokens, config.batch_size, config.context_length, phase.seed)
    losses: list[float] = []
    started = time.perf_counter()
    for step in range(phase.steps):
        lr = learning_rate(step, phase.steps, phase.peak_lr, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        ids = next(batches).to(device)
        with _autocast(device):
            output = model(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        aux_loss = 0.0 if output.aux_loss is None else output.aux_loss.item()
        losses.append(output.loss.item() - config.router_aux_loss_coef * aux_loss)
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"{phase.name} phase: loss {losses[-1]} at step {step}; lower its learning rate")
        if progress:
            progress(phase.name, step + 1, phase.steps, f"loss {losses[-1]:.2f}")
    return PhaseResult(tuple(losses), time.perf_counter() - started)


@torch.inference_mode()
def heldout_loss(model: PreTrainedModel, tokens: Tensor, config: ReferenceModelConfig) -> tuple[float, int]:
    """Mean negative log likelihood in nats per token, and how many tokens were scored.

    Windows of context_length do not overlap and lie evenly over the text; a window's first token is
    context only.

    Args:
        model: moved to the device and left there.
        tokens: held-out ids [N] int64; at least one window.
        config: device, context length, batch size and tokens to score.
    """
    device = torch.device(config.device)
    model.to(device).eval()
    num_windows = len(tokens) // config.context_length
    windows = tokens[: num_windows * config.context_length].view(num_windows, config.context_length)
    wanted = min(num_windows, max(1, config.eval_tokens // config.context_length))
    windows = windows[torch.linspace(0, num_windows - 1, wanted).long()]
    total = 0.0
    for batch in windows.split(config.batch_size):
        ids = batch.to(device)
        with _autocast(device):
            logits = model(input_ids=ids, use_cache=False, output_router_logits=False).logits
        total += torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        ).item()
    scored = wanted * (config.context_length - 1)
    return total / scored, scored
