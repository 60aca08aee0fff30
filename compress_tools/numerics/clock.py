"""Seconds by stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StageClock:
    """Seconds by stage, of one thread; a stage inside another one is taken off the outer.

    Attributes:
        seconds: by stage.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        outer, self._inner = self._inner, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner
            self._inner = outer + spent

    def share_out(self, wall_s: float, clocks: "list[StageClock]") -> None:
        """Add ``wall_s`` that threads spent side by side, in the proportions of their own clocks."""
        busy = sum(sum(clock.seconds.values()) for clock in clocks)
        for clock in clocks:
            for name, seconds in clock.seconds.items():
                self.seconds[name] = self.seconds.get(name, 0.0) + (wall_s * seconds / busy if busy else 0.0)
