"""`python -m benchmarks.quality.glue`: a Switch Transformer fine-tuned on a classification task, then compressed.

The paper's table for Switch: accuracy and approximation error of each method at the same share of parameters. Files
in SST-2's layout (`sentence<TAB>label`, or JSON lines with both keys) are taken with --train and --dev. Without them
a task is made from Python's standard library: which of two packages does a passage come from?

No pretrained weights: the small model learns the task from random weights, all experts of a layer starting as copies
of one, as an upcycled model's do. Absolute accuracies are this model's own; the order of methods is what to look at.
"""

import csv
import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from benchmarks.harness.rows import Row, print_rows, write_rows
from benchmarks.models.reference_models.corpus import read_corpus
from benchmarks.models.reference_models.tokenizer import save_tokenizer, train_tokenizer
from benchmarks.quality.merging import merge_all
from compress_tools import register_with_transformers
from compress_tools.architectures.experts import ExpertWeights
from compress_tools.config import make_config
from compress_tools.errors import CheckpointError
from compress_tools.pipeline import compress
from compress_tools.source.design_matrix import design_to_rows, expert_to_rows, rows_to_design

PACKAGES = (("asyncio", "concurrent", "multiprocessing"), ("email", "http", "urllib"))
PASSAGE_LINES = 3
MAX_TOKENS = 64
VOCABULARY = 1024
# name -> options of `resmoe compress`; center "none" is the plain method
COMPARED: dict[str, dict[str, str]] = {
    "plain pruning (UP)": {"method": "prune", "center": "none"},
    "plain SVD": {"method": "low-rank", "center": "none"},
    "mean center + UP": {"method": "prune", "center": "mean"},
    "ResMoE (UP)": {"method": "prune", "center": "barycenter"},
    "ResMoE (SVD)": {"method": "low-rank", "center": "barycenter"},
}
# name -> center that takes every expert's place
MERGED = {"merging, plain average": "mean", "merging, aligned average": "barycenter"}


@dataclass(frozen=True)
class Example:
    """One sentence with its class, 0 or 1."""

    sentence: str
    label: int


def read_examples(path: Path) -> list[Example]:
    """Read a TSV file with a `sentence` and a `label` column, or JSON lines with both keys.

    Raises:
        CheckpointError: the file is missing, or a line has no sentence or no label 0 or 1.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".jsonl":
                lines = [json.loads(line) for line in file if line.strip()]
            else:
                lines = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        return [Example(line["sentence"], ("0", "1").index(str(line["label"]).strip())) for line in lines]
    except (OSError, KeyError, ValueError) as err:
        raise CheckpointError(f"{path}: expected SST-2's layout, sentence and label (0 or 1): {err!r}") from err


def standard_library_task(seed: int, limit: int) -> tuple[list[Example], list[Example]]:
    """Passages of two groups of packages, split by file into (train, dev)."""
    train: list[Example] = []
    dev: list[Example] = []
    for module in read_corpus().train:
        label = next((n for n, names in enumerate(PACKAGES) if module.name.split("/")[0] in names), None)
        if label is None:
            continue
        lines = [line.strip() for line in module.text.splitlines() if len(line.strip()) > 15]
        target = dev if sum(module.name.encode()) % 5 == 0 else train
        target += [
            Example(" ".join(lines[start : start + PASSAGE_LINES]), label)
            for start in range(0, len(lines) - PASSAGE_LINES, PASSAGE_LINES)
        ]
    shuffler = random.Random(seed)
    for examples in (train, dev):
        shuffler.shuffle(examples)
    return train[:limit], dev[: limit // 4]


def new_model(seed: int, experts: int) -> SwitchTransformersForConditionalGeneration:
    """A small Switch Transformer; all experts of a layer start as copies of the first."""
    torch.manual_seed(seed)
    model = SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            vocab_size=VOCABULARY,
            d_model=128,
            d_ff=256,
            d_kv=32,
            num_heads=4,
            num_layers=4,
            num_decoder_layers=2,
            num_sparse_encoder_layers=2,
            num_sparse_decoder_layers=1,
            num_experts=experts,
            expert_capacity=MAX_TOKENS,
            decoder_start_token_id=0,
            pad_token_id=0,
            initializer_factor=0.3,
            dropout_rate=0.0,
        )
    )
    for module in model.modules():
        if isinstance(module, nn.ModuleDict):
            first = module["expert_0"].state_dict()
            for expert in module.values():
                expert.load_state_dict(first)
    return model


def batch(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> tuple[dict[str, Tensor], Tensor]:
    """Encoder inputs [B, L], and classes [B]."""
    inputs = tokenizer(
        [example.sentence for example in examples],
        padding=True,
        truncation=True,
        max_length=MAX_TOKENS,
        return_tensors="pt",
    )
    labels = torch.tensor([example.label for example in examples])
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}, labels


def class_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Text to text: the first generated token says the class; ids 1 and 2 stand for 0 and 1. [B, 2]."""
    start = torch.zeros(len(inputs["input_ids"]), 1, dtype=torch.long)
    return model(**inputs, decoder_input_ids=start).logits[:, 0, 1:3]


def fine_tune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    examples: list[Example],
    steps: int,
    seed: int,
    console: Console,
) -> None:
    """Train in place: AdamW, linear decay, batches of 32."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    picker = random.Random(seed)
    model.train()
    for _ in track(range(steps), description="fine-tuning", console=console):
        inputs, labels = batch(tokenizer, picker.choices(examples, k=32))
        loss = nn.functional.cross_entropy(class_logits(model, inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def accuracy(model: nn.Module, tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> float:
    """Share of examples whose class is found, in percent."""
    right = 0
    with torch.no_grad():
        for begin in range(0, len(examples), 64):
            inputs, labels = batch(tokenizer, examples[begin : begin + 64])
            right += int((class_logits(model, inputs).argmax(1) == labels).sum())
    return 100 * right / len(examples)


def merge_experts(model: nn.Module, center: str) -> float:
    """Put one center in every expert's place; returns the approximation error, mean over layers.

    The error is the paper's, ``||T_k W_k - center||_F^2 / I``, mean over experts.
    """
    errors = []
    for module in model.modules():
        if not isinstance(module, nn.ModuleDict):
            continue
        experts = [ExpertWeights(None, e.wi.weight.data, e.wo.weight.data) for e in module.values()]
        design = torch.stack([rows_to_design(expert_to_rows(expert)) for expert in experts])
        merged = merge_all(design, center)
        rows = design_to_rows(merged.centers[0], ("up_proj", "down_proj"))
        errors.append(merged.squared_error / len(experts) / design.shape[1])
        for expert in module.values():
            expert.wi.weight.data.copy_(rows["up_proj"])
            expert.wo.weight.data.copy_(rows["down_proj"].T)
    return sum(errors) / len(errors)


@click.command()
@click.option("--train", "train_file", type=click.Path(path_type=Path), help="Training examples, SST-2 layout.")
@click.option("--dev", "dev_file", type=click.Path(path_type=Path), help="Development examples.")
@click.option("--retain-ratio", default=0.25, show_default=True, help="Share of parameters kept.")
@click.option("--experts", default=8, show_default=True, type=click.IntRange(min=2))
@click.option("--steps", default=400, show_default=True, type=click.IntRange(min=1))
@click.option("--examples", default=4000, show_default=True, type=click.IntRange(min=8), help="At most, for training.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows to FILE.")
def main(train_file: Path | None, dev_file: Path | None, examples: int, json_file: Path | None, **options: Any) -> None:
    """Fine-tune a small Switch Transformer, compress it by each method, compare accuracy and error."""
    if (train_file is None) != (dev_file is None):
        raise click.UsageError("--train and --dev come together")
    console = Console(stderr=True)
    if train_file and dev_file:
        try:
            train, dev = read_examples(train_file), read_examples(dev_file)
        except CheckpointError as err:
            raise click.UsageError(str(err)) from err
    else:
        train, dev = standard_library_task(options["seed"], examples)
    rows = compare(train, dev, **options, console=console)
    kept = f"{options['retain_ratio']:.0%} of parameters kept"
    print_rows(rows, f"Switch Transformer, {options['experts']} experts, {kept}")
    if json_file:
        write_rows(rows, json_file)


def compare(
    train: list[Example],
    dev: list[Example],
    retain_ratio: float,
    experts: int,
    steps: int,
    seed: int,
    console: Console,
) -> list[Row]:
    """Fine-tune, compress by each method, measure."""
    register_with_transformers()
    tokenizer = train_tokenizer((example.sentence for example in train), VOCABULARY, MAX_TOKENS)
    model = new_model(seed, experts)
    fine_tune(model, tokenizer, train, steps, seed, console)
    rows = [Row("original: accuracy", accuracy(model, tokenizer, dev), "%", context={"method": "original"})]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        model.save_pretrained(source)
        save_tokenizer(tokenizer, source)
        for number, (name, options) in enumerate(COMPARED.items()):
            console.print(name, highlight=False)
            target = Path(folder) / str(number)
            report = compress(source, target, make_config(retain_ratio=retain_ratio, **options))
            small = AutoModelForSeq2SeqLM.from_pretrained(target, dtype=torch.float32)
            error = sum(layer.approximation_error for layer in report.layers) / len(report.layers)
            rows += _rows(name, accuracy(small, tokenizer, dev), error, report.expert_bytes_after)
        for name, center in MERGED.items():
            console.print(name, highlight=False)
            merged = AutoModelForSeq2SeqLM.from_pretrained(source, dtype=torch.float32)
            error = merge_experts(merged, center)
            rows += _rows(name, accuracy(merged, tokenizer, dev), error, None)
    return rows


def _rows(name: str, found: float, error: float, expert_bytes: int | None) -> list[Row]:
    context = {"method": name, "expert_bytes": expert_bytes}
    return [
        Row(f"{name}: accuracy", found, "%", context=context),
        Row(f"{name}: approximation error", error, "", context=context),
    ]


if __name__ == "__main__":
    main()
