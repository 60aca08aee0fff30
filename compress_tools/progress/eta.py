"""How much longer: measured from the shards and stages that are already done, never guessed."""

import time
from collections import defaultdict
from collections.abc import Callable


class Eta:
    """Follows a run's events and extrapolates them.

    A layer takes far longer than a shard of copied tensors, and a resumed shard takes nothing; so shards that
    took no stage are not measured, and of shards only those of layers are. Other units (files, samples) are alike.

    Args:
        now: clock in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.total = 0
        self.done = 0
        self._shard_begun: float | None = None
        self._of_shards, self._is_layer = True, False
        self._measured_s: list[float] = []
        self._stage_s: dict[str, list[float]] = defaultdict(list)
        self._stage: tuple[str, float] | None = None

    def start(self, total: int, unit: str = "shard") -> None:
        """Work of ``total`` units begins."""
        self.total, self._of_shards = total, unit == "shard"

    def stage(self, text: str) -> None:
        """A stage begins; stages of the same text are expected to take equally long."""
        self._end_stage()
        now = self._now()
        self._stage = (text, now)
        if self._shard_begun is None:
            self._shard_begun = now

    def layer_done(self) -> None:
        """The shard that is being worked on is a compressed layer."""
        self._is_layer = True

    def shard_done(self) -> None:
        """One unit is done."""
        self._end_stage()
        self.done += 1
        if self._shard_begun is not None and (self._is_layer or not self._of_shards):
            self._measured_s.append(self._now() - self._shard_begun)
        self._shard_begun, self._is_layer = None, False

    @property
    def whole_s(self) -> float | None:
        """Seconds until all units are done; None until one was measured."""
        if not self._measured_s:
            return None
        spent = self._now() - self._shard_begun if self._shard_begun is not None else 0.0
        return max(0.0, (self.total - self.done) * _mean(self._measured_s) - spent)

    @property
    def stage_s(self) -> float | None:
        """Seconds that the present stage will still take; None if no such stage was measured."""
        if self._stage is None or not self._stage_s[self._stage[0]]:
            return None
        kind, begun = self._stage
        return max(0.0, _mean(self._stage_s[kind]) - (self._now() - begun))

    def _end_stage(self) -> None:
        if self._stage is not None:
            kind, begun = self._stage
            self._stage_s[kind].append(self._now() - begun)
            self._stage = None


def _mean(values: list[float]) -> float:
    recent = values[-8:]
    return sum(recent) / len(recent)
