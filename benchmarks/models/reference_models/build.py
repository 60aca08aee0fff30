"""The whole way: corpus, tokenizer, bigrams, dense phase, upcycling or fine-tuned experts, MoE phase, checkpoint."""

import copy
import json
import math
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.models.reference_models import corpus as corpus_module
from benchmarks.models.reference_models import model as models
from benchmarks.models.reference_models.bigram import fit_bigrams
from benchmarks.models.reference_models.config import ReferenceModelConfig
from benchmarks.models.reference_models.tokenizer import encode_documents, save_tokenizer, train_tokenizer
from benchmarks.models.reference_models.train import Phase, PhaseResult, ProgressCallback, heldout_loss, train_phase

HELDOUT_FILE = "heldout.txt"
RECIPE_FILE = "reference_model.json"


@dataclass(frozen=True)
class ReferenceModelReport:
    """What was built. Losses are nats per token; perplexity is that of the stored (rounded) weights."""

    out_dir: str
    config: dict
    versions: dict[str, str]
    num_params: int
    num_expert_params: int
    train_bytes: int
    train_tokens: int
    bigram_loss: float | None
    dense_loss: float | None
    expert_loss: float | None
    moe_loss: float | None
    heldout_loss: float
    heldout_perplexity: float
    heldout_tokens_scored: int
    residual_energy_shares: list[float]
    seconds: dict[str, float]

    @property
    def residual_energy_share(self) -> float:
        """Mean over layers of `sum_k ||W_k - mean||^2 / sum_k ||W_k||^2`."""
        return sum(self.residual_energy_shares) / len(self.residual_energy_shares)

    def to_json(self) -> str:
        """All fields and the mean residual energy share, as indented JSON."""
        return json.dumps({**asdict(self), "residual_energy_share": self.residual_energy_share}, indent=2)


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": str(torch.get_num_threads()),
    }


def _train(
    config: ReferenceModelConfig, tokens: torch.Tensor, progress: ProgressCallback | None
) -> tuple[PreTrainedModel, dict[str, PhaseResult]]:
    """The recipe's phases in order; the trained model and each phase's result by name."""
    results = {}
    begins_dense = config.recipe != "scratch"
    num_experts, top_k = (1, 1) if begins_dense else (config.num_experts, config.top_k)
    model = models.new_model(config, num_experts, top_k, config.seed)
    if config.bigram_steps:
        results["bigrams"] = fit_bigrams(model, tokens, config.bigram_steps, progress)
    if begins_dense:
        dense = Phase("dense", config.dense_steps, config.dense_lr, config.seed)
        results["dense"] = train_phase(model, tokens, config, dense, progress)
    if config.recipe == "upcycled":
        model = models.upcycle(model, config)
    if config.recipe == "merged":
        model, results["experts"] = _fine_tune_experts(model, tokens, config, progress)
    if config.moe_steps:
        # Another seed than the dense phase's: not the same windows in the same order again.
        moe = Phase("moe", config.moe_steps, config.moe_lr, config.seed + 1)
        results["moe"] = train_phase(model, tokens, config, moe, progress)
    return model, results


def _fine_tune_experts(
    dense: PreTrainedModel,
    tokens: torch.Tensor,
    config: ReferenceModelConfig,
    progress: ProgressCallback | None,
) -> tuple[PreTrainedModel, PhaseResult]:
    """One MoE model out of a dense one's MLPs, each fine-tuned on a part of the text; its routers alone may train on.

    Args:
        dense: model of the same shape with one expert; left unchanged.
        tokens: training ids [N] int64, in an order in which neighbours are alike; an expert gets a run of them.
        config: the MoE model's sizes; steps and rate of the fine-tuning.
        progress: told of all experts' steps as one phase.
    """
    moe, losses, seconds = models.upcycle(dense, config), [], 0.0
    total = config.num_experts * config.expert_steps
    for expert, part in enumerate(tokens.tensor_split(config.num_experts)):
        one = copy.deepcopy(dense)
        models.train_only(one, ".mlp.experts.")
        phase = Phase("experts", config.expert_steps, config.expert_lr, config.seed + 3 + expert)
        told = None if progress is None else _told_of_all(progress, expert * config.expert_steps, total)
        result = train_phase(one, part, config, phase, told)
        losses += result.losses
        seconds += result.seconds
        models.copy_expert(one, moe, expert)
    models.train_only(moe, ".mlp.gate.")
    return moe, PhaseResult(tuple(losses), seconds)


def _told_of_all(progress: ProgressCallback, before: int, total: int) -> ProgressCallback:
    return lambda phase, done, _, state: progress(phase, before + done, total, state)


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    heldout: str,
    recipe: dict,
    dtype: str,
    out_dir: Path,
) -> None:
    """Write an ordinary transformers checkpoint and heldout.txt, in a temporary folder renamed when whole."""
    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.config.output_router_logits = False
    model.to("cpu", getattr(torch, dtype)).save_pretrained(partial)
    save_tokenizer(tokenizer, partial)
    (partial / HELDOUT_FILE).write_bytes(heldout.encode())
    (partial / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n")
    if out_dir.exists():
        out_dir.rmdir()
    partial.rename(out_dir)


def build_reference_model(
    config: ReferenceModelConfig, out_dir: str | Path, progress: ProgressCallback | None = None
) -> ReferenceModelReport:
    """Train a reference model and write it as a transformers checkpoint.

    Args:
        config: what to build.
        out_dir: folder to create; must not exist or be empty.
        progress: called as (phase, steps done, steps in all, state); silent if None.
    Raises:
        FileExistsError: out_dir holds something.
        FileNotFoundError: this Python has no standard library in source form.
        ValueError: the text is too small for the vocabulary or the batches.
        FloatingPointError: training diverged.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(f"{out_dir} exists and is not an empty folder; choose another or remove it")
    started = time.perf_counter()
    if progress:
        progress("tokenizer", 0, 1, "")
    text = corpus_module.read_corpus(max_train_bytes=config.max_train_bytes)
    train_texts = [module.text for module in text.train]
    tokenizer = train_tokenizer(train_texts, config.vocab_size, config.context_length)
    tokens = encode_documents(tokenizer, train_texts)
    heldout_tokens = encode_documents(tokenizer, [text.heldout_text()])
    seconds = {"tokenizer": time.perf_counter() - started}
    if progress:
        progress("tokenizer", 1, 1, f"{len(tokens):,} tokens")

    model, results = _train(config, tokens, progress)
    seconds.update({name: result.seconds for name, result in results.items()})
    evaluated = time.perf_counter()
    models.stored_values(model, getattr(torch, config.dtype))
    loss, scored = heldout_loss(model, heldout_tokens, config)
    shares = models.residual_energy_shares(model)
    seconds["evaluation"] = time.perf_counter() - evaluated
    measured = {
        "config": config.model_dump(),
        "versions": _versions(),
        "num_params": model.num_parameters(),
        "num_expert_params": models.expert_params(model),
        "train_bytes": sum(len(t.encode()) for t in train_texts),
        "train_tokens": len(tokens),
        "bigram_loss": results["bigrams"].losses[-1] if "bigrams" in results else None,
        "dense_loss": results["dense"].final_loss if "dense" in results else None,
        "expert_loss": results["experts"].final_loss if "experts" in results else None,
        "moe_loss": results["moe"].final_loss if "moe" in results else None,
        "heldout_loss": loss,
        "heldout_perplexity": math.exp(loss),
        "heldout_tokens_scored": scored,
        "residual_energy_shares": shares,
    }
    _save(model, tokenizer, text.heldout_text(), measured, config.dtype, out_dir)
    seconds["total"] = time.perf_counter() - started
    return ReferenceModelReport(out_dir=str(out_dir), seconds=seconds, **measured)
