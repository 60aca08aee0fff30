"""The comparison as tables, one for each section and model."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.harness.environment import collect_environment
from benchmarks.quality.compare import Measured

TITLES = {
    "paper": "25 % of parameters kept, the paper's accounting",
    "bytes": "at equal bytes",
    "calibration": "with a calibration on training text",
    "layers": "some layers compressed, 25 % of their parameters kept",
    "experts": "made by upcycling one dense MLP; error alone",
}


def print_section(section: str, measured: Sequence[Measured], setup: Mapping[str, Any]) -> None:
    """A table for each model, smallest first."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    for model in dict.fromkeys(one.model for one in measured if one.section == section):
        rows = [one for one in measured if one.model == model]
        shown = [one for one in rows if one.section == section]
        if section != "paper":
            shown.sort(key=lambda one: one.ratio)
        console.print(section_table(section, model, [one for one in rows if one.section == "original"] + shown, setup))


def section_table(section: str, model: str, rows: Sequence[Measured], setup: Mapping[str, Any]) -> Table:
    """One model's rows. Bytes are those of all experts; shares of the original's."""
    table = Table(
        title=f"{model}: {TITLES[section]}", box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left"
    )
    table.add_column("method")
    bytes_and_error = ("on disk", "centers", "resident", "relative error")
    for column in (*bytes_and_error, "perplexity", "mean KL, nats", "99 %", "max.", "top-1 agreement"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in rows:
        table.add_row(
            one.name,
            f"{one.bytes_disk / 1e6:.2f} MB ({one.ratio:.1%})",
            f"{one.bytes_center / one.bytes_original:.1%}" if one.bytes_center else "",
            f"{one.bytes_resident / 1e6:.2f} MB",
            f"{one.relative_error:.4g}",
            *_scores(one),
        )
    environment = collect_environment()
    cut = "".join(f", {name} {value:,}" if isinstance(value, int) else f", {value}" for name, value in setup.items())
    table.caption = f"{environment.hardware}; torch {environment.torch}{cut}; {environment.command}"
    return table


def _scores(one: Measured) -> list[str]:
    """Perplexity, three figures of the KL, agreement; dashes where the error alone was measured."""
    if one.perplexity is None:
        return ["-"] * 5
    # Rounding may leave a divergence of equal models below 0.
    divergences = (f"{max(kl, 0):.3g}" for kl in (one.kl_nats, one.kl_p99_nats, one.kl_max_nats))
    return [f"{one.perplexity:.2f}", *divergences, f"{one.top1_agreement:.1%}"]
