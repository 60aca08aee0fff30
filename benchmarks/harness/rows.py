"""Result rows, which every benchmark of this repository prints as a table and writes with `--json FILE`."""

import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.harness.environment import Environment, collect_environment


@dataclass(frozen=True)
class Row:
    """One figure that was measured.

    Attributes:
        name: what was measured, as the table shows it.
        value: the figure.
        unit: its unit; empty for a plain number.
        target: what the figure is held against, or None where there is no target.
        met: whether it is met; None exactly where there is no target.
        context: further keys of this row alone, such as the model or the request rate.
    """

    name: str
    value: float | int | str
    unit: str = ""
    target: float | int | None = None
    met: bool | None = None
    context: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.target is None) != (self.met is None):
            raise ValueError(f"row {self.name!r}: target and met come together; got {self.target} and {self.met}")
        if isinstance(self.value, float) and not math.isfinite(self.value):
            raise ValueError(f"row {self.name!r}: measured {self.value}, which is no finite number")

    @classmethod
    def at_most(cls, name: str, value: float, unit: str, target: float, **context: Any) -> Self:
        """A figure that is met when it does not exceed the target."""
        return cls(name, value, unit, target, value <= target, context)

    @classmethod
    def at_least(cls, name: str, value: float, unit: str, target: float, **context: Any) -> Self:
        """A figure that is met when it reaches the target."""
        return cls(name, value, unit, target, value >= target, context)

    def to_dict(self, environment: Environment) -> dict[str, Any]:
        """The row as JSON holds it: its own keys first, then its context, then the environment's."""
        own = {key: value for key, value in asdict(self).items() if key != "context"}
        return {**own, **self.context, **asdict(environment)}


def write_rows(rows: Iterable[Row], path: str | Path, *, keep: Callable[[str], bool] = lambda _: False) -> None:
    """Write `{"rows": [...]}`, each row with the environment's keys.

    Args:
        rows: what was measured.
        path: the file.
        keep: by a row's name, whether one that the file has already stays in it, before the new ones.
    """
    environment = collect_environment()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [row.to_dict(environment) for row in rows]
    if path.exists():
        found = [row for row in json.loads(path.read_text())["rows"] if keep(row["name"])] + found
    path.write_text(json.dumps({"rows": found}, indent=2) + "\n")


def print_rows(rows: Iterable[Row], title: str, console: Console | None = None) -> None:
    """Print measured, target, and met or not; the hardware and versions stand below the table."""
    # A pipe has no width of its own; 120 columns keep the lines whole in a log.
    console = console or Console(width=None if sys.stdout.isatty() else 120)
    environment = collect_environment()
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    table.add_column("name", overflow="fold")
    for column in ("measured", "target"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("met", no_wrap=True)
    for row in rows:
        target = "" if row.target is None else format_value(row.target, row.unit)
        met = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[row.met]
        table.add_row(row.name, format_value(row.value, row.unit), target, met)
    table.caption = f"{environment.hardware}; torch {environment.torch}, vLLM {environment.vllm}; {environment.command}"
    console.print(table)


def format_value(value: float | int | str, unit: str) -> str:
    """A figure for people: four significant digits, thousands marked, its unit after it."""
    if isinstance(value, float):
        value = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    elif isinstance(value, int):
        value = f"{value:,}"
    return f"{value} {unit}".strip()
