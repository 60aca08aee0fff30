"""Progress on a terminal: bars with the time left, over a table of the layers that are done."""

from contextlib import AbstractContextManager
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from compress_tools.progress.eta import Eta
from compress_tools.progress.listener import stage_title
from compress_tools.progress.text import human_s, layer_table
from compress_tools.report import LayerReport

# More would push the bars off a small screen; the whole table is printed at the end.
ROWS_SHOWN = 12


class LiveProgress(AbstractContextManager["LiveProgress"]):
    """A live table of errors and sizes, and two bars: shards, and steps of the current stage. On stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self._eta = Eta()
        self._layers: list[LayerReport] = []
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _TimeLeft(),
            auto_refresh=False,
        )
        self._whole = self._bars.add_task("shards", total=None)
        self._stage = self._bars.add_task("", total=None, visible=False)
        self._live = Live(get_renderable=self.renderable, console=console or Console(stderr=True), transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def start(self, total: int, unit: str = "shard") -> None:
        """See ``ProgressListener``."""
        self._eta.start(total, unit)
        self._bars.update(self._whole, description=f"{unit}s", total=total)

    def stage(self, text: str, total: int | None, layer: int | None = None) -> None:
        """See ``ProgressListener``."""
        self._eta.stage(text)
        self._bars.reset(self._stage, description=stage_title(text, layer), total=total, visible=True)

    def step(self) -> None:
        """See ``ProgressListener``."""
        self._bars.advance(self._stage)

    def layer_done(self, report: LayerReport, seconds: dict[str, float]) -> None:  # noqa: ARG002 - the protocol's
        """See ``ProgressListener``."""
        self._eta.layer_done()
        self._layers.append(report)

    def shard_done(self) -> None:
        """See ``ProgressListener``."""
        self._eta.shard_done()
        self._bars.advance(self._whole)

    def say(self, text: str) -> None:
        """See ``ProgressListener``."""
        self._live.console.print(text, highlight=False, markup=False)

    def renderable(self) -> Group:
        """What is on the screen now."""
        self._bars.update(self._whole, left=self._eta.whole_s)
        self._bars.update(self._stage, left=self._eta.stage_s)
        parts: list[Table | Progress] = [self._bars]
        if self._layers:
            parts.insert(0, layer_table(self._layers[-ROWS_SHOWN:]))
        return Group(*parts)


class _TimeLeft(ProgressColumn):
    """``1:02:03 left``, from ``Eta``: rich's own guess takes all shards to be alike."""

    def render(self, task: Task) -> Text:
        """The column of one bar."""
        return Text(f"{human_s(task.fields.get('left'))} left", style="progress.remaining")
