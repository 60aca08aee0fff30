"""Is the machine quiet? Two probes of known work, and the processor time that others take, around each measurement."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

# A measurement is quiet when both probes, before and after it, took at most this multiple of the best time that the
# process has seen for them (a machine without other work has 1.2), and others took at most this share of the cores
# that it ran on.
SLOWER, OTHERS = 1.25, 0.05
# While a probe works and rests the system counts in hundredths of a second: one or two of them are no one's work.
OTHERS_AT_PROBE, REST_S = 0.15, 0.1
# Numbers for each thread, fewer than torch would not share out; and how often their cosine is taken.
LOOP_NUMBERS, LOOP_TURNS = 2**15, 200
READ_BYTES = 2**28
PAUSE_S = 1.0
_STAT = Path("/proc/stat")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Probe:
    """Known work, timed.

    Attributes:
        loop_s: arithmetic on numbers in the cache.
        read_s: reading ``READ_BYTES`` of memory.
    """

    loop_s: float
    read_s: float

    @property
    def read_gb_s(self) -> float:
        """What memory delivered."""
        return READ_BYTES / self.read_s / 1e9

    def slowdown(self, best: "Probe") -> float:
        """The slower of the two, as a multiple of the best one's."""
        return max(self.loop_s / best.loop_s, self.read_s / best.read_s)


@dataclass(frozen=True)
class Noise:
    """What was around one measurement.

    Attributes:
        before: the last probe before it.
        after: the first one after it.
        others: cores that other processes, and other guests of the machine (steal), had meanwhile, as a share of those
            that were used; None where the system does not say.
    """

    before: Probe
    after: Probe
    others: float | None

    def is_noisy(self, best: Probe) -> bool:
        """Something else was at work, as far as the best probe tells."""
        return max(self.before.slowdown(best), self.after.slowdown(best)) > SLOWER or (self.others or 0) > OTHERS

    def context(self, best: Probe) -> dict[str, Any]:
        """Keys of a row."""
        return {
            "noisy": self.is_noisy(best),
            "probe_slowdown": max(self.before.slowdown(best), self.after.slowdown(best)),
            "others_share": self.others,
            "best_loop_ms": 1e3 * best.loop_s,
            "best_read_gb_s": best.read_gb_s,
        }


class QuietMachine:
    """Waits for a quiet machine, within bounds, and says of each measurement what was around it.

    What is best is known from this process alone: where something else is at work from the first probe to the last, no
    probe can tell. So the best one's figures belong into every row.

    Args:
        threads: that measure; so many probe.
        patience_s: seconds that all waiting, and measuring again, may take together.
        probe: the known work; made here if None.
        own_seconds: processor time of all that belongs to the measurement; this process's if None.
        say: told when there is waiting.
    """

    def __init__(
        self,
        threads: int,
        patience_s: float,
        *,
        probe: Callable[[], Probe] | None = None,
        own_seconds: Callable[[], float] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.threads, self.patience_s = threads, patience_s
        self._probe = probe or make_probe(threads)
        self.own_seconds = own_seconds or process_seconds
        self._say = say
        first = [self._probe() for _ in range(5)]
        self.best = Probe(min(one.loop_s for one in first), min(one.read_s for one in first))

    def probe(self) -> Probe:
        """Do the known work once, and remember the best."""
        found = self._probe()
        self.best = Probe(min(self.best.loop_s, found.loop_s), min(self.best.read_s, found.read_s))
        return found

    def wait(self) -> Probe:
        """Return once two probes in a row were quiet, or patience has run out; the last probe."""
        quiet, said = 0, False
        while True:
            begun, busy = time.perf_counter(), self._others_seconds()
            found = self.probe()
            time.sleep(REST_S)
            others = self._share(busy, begun)
            is_quiet = found.slowdown(self.best) <= SLOWER and (others or 0) <= OTHERS_AT_PROBE
            quiet = quiet + 1 if is_quiet else 0
            if quiet == 2 or self.patience_s <= 0:
                return found
            if quiet == 0:
                if not said:
                    self._say(f"waiting for a quiet machine, {self.patience_s:.0f} s at most")
                    said = True
                time.sleep(min(PAUSE_S, self.patience_s))
            self.patience_s -= time.perf_counter() - begun

    def measure(self, work: Callable[[], Result]) -> tuple[Result, Noise]:
        """Wait, work, and look back; once more, while there is patience, where it was noisy.

        Returns:
            What the last ``work`` gave, and what was around it.
        """
        while True:
            before = self.wait()
            begun, busy = time.perf_counter(), self._others_seconds()
            result = work()
            spent, others = time.perf_counter() - begun, self._share(busy, begun)
            noise = Noise(before, self.probe(), others)
            if not noise.is_noisy(self.best) or self.patience_s <= 0:
                return result, noise
            self.patience_s -= spent

    def _share(self, busy: float | None, begun: float) -> float | None:
        """Of the cores that are used, what others had since ``begun``."""
        now = self._others_seconds()
        if busy is None or now is None:
            return None
        return max(0.0, now - busy) / ((time.perf_counter() - begun) * self.threads)

    def _others_seconds(self) -> float | None:
        busy = busy_seconds()
        return None if busy is None else busy - self.own_seconds()


def make_probe(threads: int) -> Callable[[], Probe]:
    """The known work, by as many threads: each takes cosines in its cache, then all read memory."""
    numbers = torch.ones(threads, LOOP_NUMBERS)
    source = torch.ones(READ_BYTES // 4)

    def loop() -> None:
        for _ in range(LOOP_TURNS):
            numbers.cos_()

    def probe() -> Probe:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return Probe(median_seconds(loop), median_seconds(source.sum))
        finally:
            torch.set_num_threads(before)

    return probe


def median_seconds(work: Callable[[], object], times: int = 3) -> float:
    """The median of a few times."""
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def process_seconds() -> float:
    """Processor time of this process."""
    own = os.times()
    return own.user + own.system


def busy_seconds() -> float | None:
    """Seconds that all cores have not been idle, steal included, since the machine started; None if unsaid."""
    if not _STAT.exists():
        return None
    user, nice, system, _idle, _waiting, irq, softirq, steal, *_ = (
        int(field) for field in _STAT.read_text().partition("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
