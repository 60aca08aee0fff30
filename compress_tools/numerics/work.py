"""How work is done and watched: workers, progress, clock. None of them changes a result."""

from dataclasses import dataclass, field
from typing import Protocol

from compress_tools.numerics.clock import StageClock


class Steps(Protocol):
    """Who is told how far the work is, such as a ``ProgressListener``."""

    def stage(self, text: str, total: int | None, layer: int | None = None) -> None:
        """A stage of ``total`` steps begins (None: unknown), of a layer."""
        ...

    def step(self) -> None:
        """One step of the stage is done."""
        ...


class Unwatched:
    """Nobody is told."""

    def stage(self, text: str, total: int | None, layer: int | None = None) -> None:
        """See ``Steps``."""

    def step(self) -> None:
        """See ``Steps``."""


@dataclass(frozen=True)
class Work:
    """How a layer's work is done.

    Attributes:
        workers: experts side by side.
        progress: told of stages and steps.
        clock: told of the seconds of each stage.
    """

    workers: int = 1
    progress: Steps = field(default_factory=Unwatched)
    clock: StageClock = field(default_factory=StageClock)
