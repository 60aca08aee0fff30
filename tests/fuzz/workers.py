"""Mutants in processes of their own: a bound of memory, a watchdog, and a new process in place of one that ends."""

import contextlib
import gc
import multiprocessing
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path

from tests.fuzz.mutants import Mutant, mutate
from tests.fuzz.seeds import Seed

# Address space beyond what the imports took.
ADDRESS_SPACE = 2 * 2**30
# Mutants that one process tries before a fresh one takes its place: what leaks shows as growth, and ends here.
PER_PROCESS = 2000
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Result:
    """One mutant, tried.

    Attributes:
        number: that it was made by.
        seed: name of the good checkpoint.
        changes: in words.
        kinds: of the changes.
        outcomes: by loader.
        faults: in sentences.
        seconds: that it took.
    """

    number: int
    seed: str
    changes: tuple[str, ...]
    kinds: tuple[str, ...]
    outcomes: dict[str, str]
    faults: tuple[str, ...]
    seconds: float


def make_mutant(seeds: Sequence[Seed], number: int) -> Mutant:
    """The mutant of a number: always the same one."""
    pick = random.Random(number)
    seed = pick.choice(seeds)
    return mutate(seed.name, seed.files, pick)


Maker = Callable[[Sequence[Seed], int], Mutant]


def _maker(sources: bool) -> Maker:
    from tests.fuzz.sources import make_source_mutant

    return make_source_mutant if sources else make_mutant


class Worker:
    """A forked process that tries mutants by number.

    Args:
        seeds: good checkpoints.
        whole_every: each so many-th mutant goes through vLLM's own loader, too; 0: none.
    """

    def __init__(self, seeds: Sequence[Seed], whole_every: int, *, sources: bool = False) -> None:
        self.pipe, theirs = _FORK.Pipe()
        self.process: ForkProcess = _FORK.Process(
            target=_serve, args=(seeds, whole_every, sources, theirs), daemon=True
        )
        self.process.start()
        theirs.close()
        self.number: int | None = None
        self.begun = 0.0
        self.done = 0

    def give(self, number: int) -> None:
        """Let it try one."""
        self.number, self.begun = number, time.monotonic()
        self.done += 1
        self.pipe.send(number)

    def end(self) -> None:
        """Stop the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def try_all(
    seeds: Sequence[Seed],
    numbers: Iterator[int],
    *,
    workers: int,
    whole_every: int,
    seconds_each: float,
    sources: bool = False,
) -> Iterator[Result]:
    """Results as they come.

    Args:
        seeds: good checkpoints.
        numbers: of mutants; ends the run where it ends.
        workers: processes at a time.
        whole_every: see ``Worker``.
        seconds_each: a mutant that takes longer hangs.
        sources: the checkpoints are dense ones, to be compressed.
    """
    pool = [Worker(seeds, whole_every, sources=sources) for _ in range(workers)]
    try:
        for worker in pool:
            _next(worker, numbers)
        while busy := [worker for worker in pool if worker.number is not None]:
            ready = wait([worker.pipe for worker in busy], timeout=1)
            for worker in busy:
                result = _result(_maker(sources), seeds, worker, seconds_each, ready=worker.pipe in ready)
                if result is None:
                    continue
                yield result
                worker.number = None
                place = pool.index(worker)
                if "process" in result.outcomes or worker.done >= PER_PROCESS:
                    worker.end()
                    pool[place] = Worker(seeds, whole_every, sources=sources)
                _next(pool[place], numbers)
    finally:
        for worker in pool:
            worker.end()


def _result(make: Maker, seeds: Sequence[Seed], worker: Worker, seconds_each: float, *, ready: bool) -> Result | None:
    """What a worker tells, or that it has ended or hangs; None while it works."""
    if ready:
        try:
            told: Result = worker.pipe.recv()
        except EOFError:
            worker.process.join()
            return _lost(make, seeds, worker, f"the process ended with {worker.process.exitcode}")
        return told
    hangs = time.monotonic() - worker.begun > seconds_each
    return _lost(make, seeds, worker, f"hangs for {seconds_each:g} s") if hangs else None


def _next(worker: Worker, numbers: Iterator[int]) -> None:
    number = next(numbers, None)
    if number is not None:
        worker.give(number)


def _lost(make: Maker, seeds: Sequence[Seed], worker: Worker, what: str) -> Result:
    number = worker.number or 0
    mutant = make(seeds, number)
    seconds = time.monotonic() - worker.begun
    return Result(number, mutant.seed, mutant.changes, mutant.kinds, {"process": "fault"}, (what,), seconds)


def _serve(seeds: Sequence[Seed], whole_every: int, sources: bool, pipe: Connection) -> None:
    from tests.fuzz.sources import try_source
    from tests.fuzz.trial import try_mutant

    quiet()
    bound_memory()
    gc.freeze()
    with contextlib.suppress(EOFError):
        while True:
            number = pipe.recv()
            begun = time.monotonic()
            mutant = _maker(sources)(seeds, number)
            if sources:
                trial = try_source(mutant, next(seed.files for seed in seeds if seed.name == mutant.seed))
            else:
                trial = try_mutant(mutant, whole=bool(whole_every) and number % whole_every == 0)
            seconds = time.monotonic() - begun
            faults = tuple(trial.faults)
            pipe.send(Result(number, mutant.seed, mutant.changes, mutant.kinds, trial.outcomes, faults, seconds))
    os._exit(0)


def quiet() -> None:
    """What transformers and vLLM say of each mutant is for nobody; a question is answered by an end of input."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    sys.stdin = os.fdopen(0)


def bound_memory() -> None:
    """No more address space than what is there, and ``ADDRESS_SPACE``."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
