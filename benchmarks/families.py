"""`python -m benchmarks.families`: every model family the whole way, and how far it ends from its restored twin.

A tiny checkpoint of each family (real transformers classes, random weights, seeded) is compressed with both methods,
verified, restored, and run beside its restored twin in vLLM, or in transformers where vLLM can't.
"""

import gc
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from rich.console import Console

from benchmarks.harness.rows import Row, print_rows, write_rows
from benchmarks.models.tiny_models import NOT_IN_TRANSFORMERS, TINY_CONFIGS, load_model, save_tiny_model, token_logits
from compress_tools import register_with_transformers
from compress_tools.architectures.base import MoEArchitecture
from compress_tools.architectures.registry import ARCHITECTURES
from compress_tools.config import make_config
from compress_tools.pipeline import compress
from compress_tools.stored.restore import restore
from compress_tools.stored.verify import verify

CHECKED_METHODS = ("prune", "low-rank")
PROMPTS = [list(range(3 + start, 19 + 2 * start)) for start in range(6)]
NEW_TOKENS = 12
# fp32 sums in another order; a wrong center, residual or routing moves log-probabilities by 0.01 and more.
MAX_DEVIATION = 1e-3
# Families that vLLM's CPU build computes in bf16 alone. Every expert takes part there: near a tie rounding alone would
# choose others. bf16 moves log-probabilities by 0.03, compression by 1 and more.
BF16: dict[str, dict[str, int]] = {"qwen3_next": {"num_experts_per_tok": 6}}
MAX_DEVIATION_BF16 = 0.1


@dataclass(frozen=True)
class FamilyResult:
    """One family and method.

    Attributes:
        engine: what ran it, ``vLLM`` or ``transformers``.
        max_deviation: largest difference of log-probabilities to the restored twin, teacher-forced; fp32, or bf16 for
            families in ``BF16``.
        allowed: how large it may be.
        changed: the same between the restored twin and the source: what compression changed, for scale; None
            where it was not asked for.
    """

    family: str
    method: str
    engine: str
    max_deviation: float
    allowed: float
    changed: float | None


def check_family(
    architecture: MoEArchitecture, method: str, folder: Path, *, measure_change: bool = True
) -> FamilyResult:
    """Compress, verify, restore, run both; the folder receives the checkpoints.

    A source that is there already is taken: vLLM's Transformers backend changes the classes of transformers that it
    serves, so that no model can be built with them afterwards.
    """
    family = architecture.model_type
    in_bf16 = architecture.served_here and family in BF16
    source = folder / "source"
    if not source.exists():
        dtype = torch.bfloat16 if in_bf16 else torch.float32
        save_tiny_model(family, source, dtype, **(BF16[family] if in_bf16 else {}))
    small, dense = folder / f"{method}-small", folder / f"{method}-dense"
    compress(source, small, make_config(method=method))
    verify(small, source)
    restore(small, dense)
    in_vllm = partial(vllm_logprobs, dtype="bfloat16" if in_bf16 else "float32")
    logprobs = in_vllm if architecture.served_here else transformers_logprobs
    found, twin = logprobs(small), logprobs(dense)
    changed = (twin - logprobs(source)).abs().max().item() if measure_change else None
    return FamilyResult(
        family,
        method,
        "vLLM" if architecture.served_here else "transformers",
        (found - twin).abs().max().item(),
        MAX_DEVIATION_BF16 if in_bf16 else MAX_DEVIATION,
        changed,
    )


def engine_in_this_process(path: Path, **options: Any) -> Any:
    """``LLM(path)``, after which transformers can still make models of the same class.

    vLLM's Transformers backend decorates the class itself for torch.compile, for as long as the process lives, and
    without vLLM's config no model of it can be made then. An eager engine compiles nothing: it is left out there.
    """
    from vllm import LLM
    from vllm.model_executor.models.transformers import base

    def left_as_it_is(**_: Any) -> Callable[[type], type]:
        return lambda cls: cls

    decorate = left_as_it_is if options.get("enforce_eager") else base.support_torch_compile
    with mock.patch.object(base, "support_torch_compile", decorate):
        return LLM(str(path), **options)


def vllm_logprobs(path: Path, **options: Any) -> torch.Tensor:
    """Log-probabilities that vLLM gives to every token of fixed prompts, ``[tokens]``, fp32; in this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import SamplingParams

    defaults = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 64,
        "trust_remote_code": True,
        "enable_prefix_caching": False,
    }
    engine = engine_in_this_process(path, **{**defaults, **options})
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    values = [
        step[token].logprob
        for prompt, output in zip(PROMPTS, outputs, strict=True)
        for token, step in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
    ]
    del engine
    gc.collect()
    return torch.tensor(values)


def transformers_logprobs(path: Path) -> torch.Tensor:
    """The same from transformers; for an encoder-decoder the prompt is both input and target."""
    register_with_transformers()
    model = load_model(path)
    values = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        logits = token_logits(model, tokens)[0, :-1]
        values.append(logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0])
    return torch.cat(values)


def family_table(architectures: tuple[MoEArchitecture, ...] = ARCHITECTURES) -> str:
    """The table of docs/models.md; tested means that the test suite takes the family the whole way."""
    lines = [
        "| family | `model_type` | published as | served by vLLM | in transformers | tested |",
        "|---|---|---|---|---|---|",
    ]
    for known in architectures:
        in_transformers = NOT_IN_TRANSFORMERS.get(known.model_type, "yes")
        tested = "yes" if known.model_type in TINY_CONFIGS else "no"
        reason = known.runs_in.removeprefix("transformers only: ")
        here = "yes, on a CPU in bf16 alone" if known.model_type in BF16 else "yes"
        served = here if known.served_here else f"not by its CPU build: {reason}" if known.vllm else f"no: {reason}"
        published = ", ".join(known.models)
        lines.append(
            f"| {known.title} | `{known.model_type}` | {published} | {served} | {in_transformers} | {tested} |"
        )
    return "\n".join(lines)


@click.command()
@click.option("--family", "families", multiple=True, help="model_type; default: all.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows to FILE.")
@click.option("--merge", is_flag=True, help="Keep the rows of other families that FILE has.")
@click.option("--table", is_flag=True, help="Print the family table of docs/models.md and stop.")
def main(*, families: tuple[str, ...], json_file: Path | None, merge: bool, table: bool) -> None:
    """Take every family the whole way and print its deviation from the restored twin."""
    if table:
        print(family_table())
        return
    console = Console(stderr=True)
    rows = []
    for architecture in ARCHITECTURES:
        if families and architecture.model_type not in families:
            continue
        if not architecture.served_here and architecture.model_type in NOT_IN_TRANSFORMERS:
            why = f"{architecture.runs_in}; transformers: {NOT_IN_TRANSFORMERS[architecture.model_type]}"
            console.print(f"{architecture.title}: nothing here runs it: {why}", highlight=False)
            continue
        console.print(architecture.title, highlight=False)
        with tempfile.TemporaryDirectory() as folder:
            results = [check_family(architecture, method, Path(folder)) for method in CHECKED_METHODS]
        for method, result in zip(CHECKED_METHODS, results, strict=True):
            engine = f"{result.engine} in bf16" if result.allowed == MAX_DEVIATION_BF16 else result.engine
            rows.append(
                Row.at_most(
                    f"{result.family}, {method}, {engine}: max |dlogprob| to the restored twin",
                    result.max_deviation,
                    "",
                    result.allowed,
                    changed_by_compression=result.changed,
                )
            )
    print_rows(rows, "model families")
    if json_file:
        measured = {row.name.partition(",")[0] for row in rows}
        write_rows(rows, json_file, keep=lambda name: merge and name.partition(",")[0] not in measured)


if __name__ == "__main__":
    main()
