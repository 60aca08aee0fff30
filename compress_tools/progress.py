"""Progress of long work: a protocol the engine calls, a silent form, and rich bars on stderr."""

from contextlib import AbstractContextManager
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressListener(Protocol):
    """What long work reports."""

    def start(self, total: int) -> None:
        """Work of ``total`` shards begins."""
        ...

    def stage(self, text: str, total: int | None) -> None:
        """A stage of ``total`` steps begins (None: unknown)."""
        ...

    def step(self) -> None:
        """One step of the stage is done."""
        ...

    def shard_done(self) -> None:
        """One shard is done."""
        ...

    def say(self, text: str) -> None:
        """A line for the log."""
        ...


class Silent:
    """Reports nothing."""

    def start(self, total: int) -> None:
        """See ``ProgressListener``."""

    def stage(self, text: str, total: int | None) -> None:
        """See ``ProgressListener``."""

    def step(self) -> None:
        """See ``ProgressListener``."""

    def shard_done(self) -> None:
        """See ``ProgressListener``."""

    def say(self, text: str) -> None:
        """See ``ProgressListener``."""


class RichProgress(AbstractContextManager["RichProgress"]):
    """Two bars on stderr: shards, and steps of the current stage."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._whole = self._bars.add_task("shards", total=None)
        self._stage = self._bars.add_task("", total=None, visible=False)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.update(self._stage, visible=False)
        self._bars.stop()

    def start(self, total: int) -> None:
        """See ``ProgressListener``."""
        self._bars.update(self._whole, total=total)

    def stage(self, text: str, total: int | None) -> None:
        """See ``ProgressListener``."""
        self._bars.reset(self._stage, description=text, total=total, visible=True)

    def step(self) -> None:
        """See ``ProgressListener``."""
        self._bars.advance(self._stage)

    def shard_done(self) -> None:
        """See ``ProgressListener``."""
        self._bars.advance(self._whole)

    def say(self, text: str) -> None:
        """See ``ProgressListener``."""
        self._bars.console.print(text, highlight=False, markup=False)
