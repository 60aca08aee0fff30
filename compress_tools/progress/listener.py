"""Progress of long work: a protocol the engine calls, a silent form, and several listeners as one."""

from typing import Protocol

from compress_tools.report import LayerReport


def stage_title(text: str, layer: int | None) -> str:
    """A stage as people read it: ``layer 3: reading``."""
    return text if layer is None else f"layer {layer}: {text}"


class ProgressListener(Protocol):
    """What long work reports."""

    def start(self, total: int, unit: str = "shard") -> None:
        """Work of ``total`` units begins."""
        ...

    def stage(self, text: str, total: int | None, layer: int | None = None) -> None:
        """A stage of ``total`` steps begins (None: unknown); stages of one text in different ``layer`` are alike."""
        ...

    def step(self) -> None:
        """One step of the stage is done."""
        ...

    def layer_done(self, report: LayerReport, seconds: dict[str, float]) -> None:
        """One layer is written; ``seconds`` by stage. Its ``shard_done`` follows."""
        ...

    def shard_done(self) -> None:
        """One unit is done."""
        ...

    def say(self, text: str) -> None:
        """A line for the log."""
        ...


class Silent:
    """Reports nothing."""

    def start(self, total: int, unit: str = "shard") -> None:
        """See ``ProgressListener``."""

    def stage(self, text: str, total: int | None, layer: int | None = None) -> None:
        """See ``ProgressListener``."""

    def step(self) -> None:
        """See ``ProgressListener``."""

    def layer_done(self, report: LayerReport, seconds: dict[str, float]) -> None:
        """See ``ProgressListener``."""

    def shard_done(self) -> None:
        """See ``ProgressListener``."""

    def say(self, text: str) -> None:
        """See ``ProgressListener``."""


class Together:
    """Passes every event on to each of several listeners."""

    def __init__(self, *listeners: ProgressListener) -> None:
        self._listeners = listeners

    def start(self, total: int, unit: str = "shard") -> None:
        """See ``ProgressListener``."""
        for listener in self._listeners:
            listener.start(total, unit)

    def stage(self, text: str, total: int | None, layer: int | None = None) -> None:
        """See ``ProgressListener``."""
        for listener in self._listeners:
            listener.stage(text, total, layer)

    def step(self) -> None:
        """See ``ProgressListener``."""
        for listener in self._listeners:
            listener.step()

    def layer_done(self, report: LayerReport, seconds: dict[str, float]) -> None:
        """See ``ProgressListener``."""
        for listener in self._listeners:
            listener.layer_done(report, seconds)

    def shard_done(self) -> None:
        """See ``ProgressListener``."""
        for listener in self._listeners:
            listener.shard_done()

    def say(self, text: str) -> None:
        """See ``ProgressListener``."""
        for listener in self._listeners:
            listener.say(text)
