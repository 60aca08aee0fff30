"""`python -m benchmarks.models.reference_models --preset demo --out DIR [--any-option ...] [--json FILE]`."""

import argparse
import sys
from pathlib import Path
from typing import Self

from pydantic import ValidationError
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from benchmarks.models.reference_models.build import ReferenceModelReport, build_reference_model
from benchmarks.models.reference_models.config import PRESETS, ReferenceModelConfig, preset_config

EXIT_USAGE = 2
LOG_LINES = 10  # per phase, where stderr is no terminal


class RichProgress:
    """A progress callback on stderr: one bar with an ETA per phase, or, in a log file, some lines per phase.

    Use as a context manager.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[state]}"),
            console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._tasks: dict = {}

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, phase: str, done: int, total: int, state: str) -> None:
        """Show that `done` of `total` steps of a phase are done."""
        if phase not in self._tasks:
            self._tasks[phase] = self._bar.add_task(phase, total=total, state=state)
        self._bar.update(self._tasks[phase], completed=done, state=state)
        if self._bar.disable and (done == total or done % max(1, total // LOG_LINES) == 0):
            self._console.print(f"{phase} {done}/{total} {state}", highlight=False)


def build_parser() -> argparse.ArgumentParser:
    """Options: preset, out, json, and one per field of ReferenceModelConfig."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models.reference_models", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="demo", help="what the other options start from")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to create")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here as JSON")
    for name, field in ReferenceModelConfig.model_fields.items():
        # Values stay strings here: pydantic is the one place that parses and checks them.
        parser.add_argument(
            f"--{name.replace('_', '-')}", dest=f"field_{name}", metavar="X", default=argparse.SUPPRESS,
            help=f"{field.description} (default {field.default}, unless the preset says otherwise)",
        )  # fmt: skip
    return parser


def report_table(report: ReferenceModelReport) -> Table:
    """The short final table."""
    table = Table(show_header=False, title=report.out_dir)
    share = report.num_expert_params / report.num_params
    phases = {
        "bigrams": report.bigram_loss,
        "dense": report.dense_loss,
        "experts": report.expert_loss,
        "MoE": report.moe_loss,
    }
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in phases.items() if loss is not None)
    rows = {
        "params": f"{report.num_params / 1e6:.2f} M, {share:.0%} in experts",
        "training text": f"{report.train_bytes / 1e6:.1f} MB, {report.train_tokens:,} tokens",
        "final losses": f"{losses} nats/token",
        "held-out perplexity": f"{report.heldout_perplexity:.2f} ({report.heldout_tokens_scored:,} tokens)",
        "residual energy": f"{report.residual_energy_share:.1%} of the experts' (mean of layers, unaligned)",
        "wall time": ", ".join(f"{name} {value:.0f} s" for name, value in report.seconds.items()),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def main(argv: list[str] | None = None) -> int:
    """Parse, build, print; the exit code (0, or 2 for usage, config or an output folder in the way)."""
    args = vars(build_parser().parse_args(argv))
    fields = {name.removeprefix("field_"): value for name, value in args.items() if name.startswith("field_")}
    try:
        config = preset_config(args["preset"], **fields)
        with RichProgress() as progress:
            report = build_reference_model(config, args["out"], progress)
    except ValidationError as err:
        for problem in err.errors():
            where = "--" + "-".join(str(p).replace("_", "-") for p in problem["loc"]) if problem["loc"] else "config"
            print(f"error: {where}: {problem['msg']}, found {problem['input']!r:.80}", file=sys.stderr)
        return EXIT_USAGE
    except (FileExistsError, FileNotFoundError, ValueError, FloatingPointError) as err:
        print(f"error: {err}", file=sys.stderr)
        return EXIT_USAGE
    Console().print(report_table(report))
    if args["json"]:
        args["json"].write_text(report.to_json() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
