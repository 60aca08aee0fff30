"""`resmoe demo`: train a small MoE, compress it three times, serve all four with vLLM, ask them, compare.

Also `python -m benchmarks.demo [--out DIR]`. Results: one table on stdout, `DIR/summary.json` and
`DIR/summary.png`; the four models stay in DIR.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.demo_picture import draw
from benchmarks.harness.environment import collect_environment
from benchmarks.harness.rows import format_value
from benchmarks.models.prepared import compress, ensure_reference_model, expert_bytes_on_disk
from benchmarks.models.reference_models import ReferenceModelConfig, preset_config
from benchmarks.models.reference_models.build import HELDOUT_FILE
from benchmarks.serving.client import Client
from benchmarks.serving.server import ServerError, VllmServer
from compress_tools.errors import ResMoEError

# Row, folder, options of `resmoe compress`.
COMPRESSED = {
    "25 % of the bytes": ("budget", ("--target-bytes-ratio", "0.25")),
    "pruned 25 %": ("prune", ("--method", "prune", "--retain-ratio", "0.25")),
    "low rank 25 %": ("low-rank", ("--method", "low-rank", "--retain-ratio", "0.25")),
}
PROMPT = 'def read_lines(path):\n    """'
SAMPLE_TOKENS = 40
SPEED_TOKENS = 96
# A stream takes a fraction of a second: the median of a few hangs on what else the machine does at that moment.
SPEED_RUNS = 15
# The held-out text's beginning; enough that the models' order does not hang on a few tokens.
PERPLEXITY_TOKENS = 16_384


@dataclass(frozen=True)
class DemoRow:
    """One served model. Bytes are those of all routed experts, centers and masks included."""

    name: str
    expert_bytes_disk: int
    expert_bytes_resident: int
    perplexity: float
    tokens_per_s: float
    sample: str
    sample_mean_logprob: float
    perplexity_tokens: int
    perplexity_window: int
    perplexity_stride: int
    server_command: str
    startup_s: float


def run_demo(out_dir: str | Path = "demo-output", config: ReferenceModelConfig | None = None) -> list[DemoRow]:
    """The whole demo; its files are written to `out_dir`.

    Args:
        out_dir: created if missing; a model of the same recipe in it is not trained again.
        config: the model to train; the preset "demo" if None.
    Raises:
        ResMoEError: a step failed, or a server's answers contradict each other.
    """
    out_dir, console, started = Path(out_dir), Console(stderr=True), time.perf_counter()
    models = {"original": out_dir / "original"}
    console.rule("1/4 train a small Mixtral on Python's standard library")
    ensure_reference_model(config or preset_config("demo"), models["original"], console)
    console.rule("2/4 compress")
    for name, (folder, options) in COMPRESSED.items():
        models[name] = out_dir / folder
        compress(models["original"], models[name], *options, console=console)
    console.rule("3/4 serve and ask")
    heldout = (models["original"] / HELDOUT_FILE).read_text()
    rows = [serve_and_ask(name, model_dir, heldout, out_dir, console) for name, model_dir in models.items()]
    console.rule("4/4 compare")
    seconds = time.perf_counter() - started
    write_summary(rows, seconds, out_dir / "summary.json")
    panels = {
        "expert MB on disk": [row.expert_bytes_disk / 1e6 for row in rows],
        "expert MB resident in vLLM": [row.expert_bytes_resident / 1e6 for row in rows],
        "held-out perplexity": [row.perplexity for row in rows],
        "tokens/s, one stream": [row.tokens_per_s for row in rows],
    }
    draw(list(models), panels, out_dir / "summary.png")
    print_table(rows)
    console.print(f"{seconds:.0f} s. {out_dir / 'summary.json'}, {out_dir / 'summary.png'}", highlight=False)
    return rows


def serve_and_ask(name: str, model_dir: Path, heldout: str, out_dir: Path, console: Console) -> DemoRow:
    """Serve one model, no option beyond directory and port, and ask it in every way that the row needs."""
    with VllmServer(model_dir, log_path=out_dir / f"serve-{model_dir.name}.log", console=console) as server:
        command = server.shown_command
        console.print(f"$ {command}   (healthy after {server.startup_s:.0f} s)", highlight=False)
        client = Client(server)
        with console.status(f"{name}: completions, streaming, logprobs, perplexity"):
            sample = client.complete(PROMPT, SAMPLE_TOKENS)
            logprobs = client.token_logprobs(PROMPT, SAMPLE_TOKENS)
            streamed = client.stream(PROMPT, SAMPLE_TOKENS).text
            if not streamed.startswith(sample):
                raise ServerError(f"{name}: streaming said {streamed!r}, the plain completion {sample!r}")
            tokens_per_s = client.tokens_per_s(PROMPT, SPEED_TOKENS, SPEED_RUNS)
            perplexity = client.perplexity(heldout, max_tokens=PERPLEXITY_TOKENS)
        return DemoRow(
            name=name,
            expert_bytes_disk=expert_bytes_on_disk(model_dir),
            expert_bytes_resident=sum(server.resident_expert_bytes().values()),
            perplexity=perplexity.value,
            tokens_per_s=tokens_per_s,
            sample=sample,
            sample_mean_logprob=statistics.fmean(logprobs),
            perplexity_tokens=perplexity.tokens_scored,
            perplexity_window=perplexity.window,
            perplexity_stride=perplexity.stride,
            server_command=command,
            startup_s=server.startup_s,
        )


def write_summary(rows: list[DemoRow], seconds: float, path: Path) -> None:
    """The rows, the prompt of the samples, the whole run's seconds and the environment."""
    content = {
        "rows": [asdict(row) for row in rows],
        "prompt": PROMPT,
        "seconds": seconds,
        "environment": asdict(collect_environment()),
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def print_table(rows: list[DemoRow]) -> None:
    """One line a model; bytes also as a share of the original's."""
    first = rows[0]
    table = Table(title="Experts of the original against ResMoE's", title_justify="left", caption_justify="left")
    for heading in ("", "on disk", "resident in vLLM", "held-out perplexity", "tokens/s"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    table.add_column(f"sample after {PROMPT!r}", overflow="fold")
    for row in rows:
        table.add_row(
            row.name,
            _bytes(row.expert_bytes_disk, first.expert_bytes_disk),
            _bytes(row.expert_bytes_resident, first.expert_bytes_resident),
            format_value(row.perplexity, ""),
            f"{row.tokens_per_s:.1f}",
            # One paragraph here; as it came in summary.json.
            " ".join(row.sample.split()),
            end_section=True,
        )
    environment = collect_environment()
    table.caption = (
        f"{environment.hardware}; vLLM {environment.vllm}; one stream, "
        f"greedy; perplexity over {first.perplexity_tokens:,} tokens, window {first.perplexity_window}, "
        f"stride {first.perplexity_stride}"
    )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table, highlight=False)
    if note := slower_note(rows):
        console.print(note, highlight=False)


def slower_note(rows: list[DemoRow]) -> str | None:
    """A sentence on the models that answer slower than the original, the first row; None where none does."""
    first = rows[0]
    slower = [
        f"{row.name} at {row.tokens_per_s / first.tokens_per_s:.0%}"
        for row in rows[1:]
        if row.tokens_per_s < first.tokens_per_s
    ]
    if not slower:
        return None
    return (
        f"Slower than the original on this machine: {', '.join(slower)} of its {first.tokens_per_s:.1f} tokens/s. What "
        "compression saves here is memory, not time."
    )


def _bytes(value: int, original: int) -> str:
    return f"{value / 1e6:.2f} MB ({value / original:.0%})"


def main(argv: list[str] | None = None) -> int:
    """Run the demo; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR")
    args = parser.parse_args(argv)
    try:
        run_demo(args.out)
    except ResMoEError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
