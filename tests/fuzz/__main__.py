"""`make fuzz`: changed checkpoints through every loader; docs/notes/fuzzing.md says what is asked of them."""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from tests.fuzz import loaders
from tests.fuzz.seeds import Seed, make_seeds
from tests.fuzz.sources import make_source_mutant, make_sources, try_source
from tests.fuzz.trial import try_mutant
from tests.fuzz.workers import Result, make_mutant, try_all

LOADERS = (
    "plan",
    "compress",
    "probe",
    "verify",
    "transformers",
    "plugin",
    "vllm",
    "restore",
    "twin",
    "truth",
    "process",
)


def main() -> int:
    """Parse, try, print; 1 where anything was found."""
    options = _options()
    loaders.register()
    with tempfile.TemporaryDirectory(prefix="resmoe-fuzz-seeds-") as name:
        seeds = make_sources(Path(name)) if options.sources else make_seeds(Path(name))
    if options.only is not None:
        return _explain(seeds, options.only, sources=bool(options.sources))
    begun = time.monotonic()
    results: list[Result] = []
    numbers = _numbers(options.first, options.sources or options.mutants, begun + 60 * options.minutes)
    for result in try_all(
        seeds,
        numbers,
        workers=options.workers,
        whole_every=options.whole_every,
        seconds_each=options.seconds_each,
        sources=bool(options.sources),
    ):
        results.append(result)
        for fault in result.faults:
            print(f"{result.number}: {result.seed}: {'; '.join(result.changes)}: {fault}", flush=True)
        if len(results) % 500 == 0:
            print(f"{len(results)} mutants in {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    print(_table(results, len(seeds), time.monotonic() - begun))
    return int(any(result.faults for result in results))


def _numbers(first: int, count: int, deadline: float) -> Iterator[int]:
    for number in itertools.count(first):
        if number >= first + count or time.monotonic() > deadline:
            return
        yield number


def _explain(seeds: list[Seed], number: int, *, sources: bool) -> int:
    mutant = make_source_mutant(seeds, number) if sources else make_mutant(seeds, number)
    if sources:
        trial = try_source(mutant, next(seed.files for seed in seeds if seed.name == mutant.seed))
    else:
        trial = try_mutant(mutant, whole=True)
    print(f"{mutant.seed}: {'; '.join(mutant.changes)}")
    for loader, outcome in trial.outcomes.items():
        print(f"  {loader}: {outcome} {trial.sentences.get(loader, '')}")
    print(*trial.faults, sep="\n")
    return int(bool(trial.faults))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="end after that time")
    parser.add_argument("--mutants", type=int, default=10**9, help="end after so many")
    parser.add_argument("--sources", type=int, default=0, help="so many dense checkpoints to compress, instead")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--whole-every", type=int, default=200, help="mutants for one through vLLM's own loader")
    parser.add_argument("--seconds-each", type=float, default=60, help="what takes longer hangs")
    parser.add_argument("--only", type=int, help="one number, and what every loader says of it")
    return parser.parse_args()


def _table(results: list[Result], seeds: int, seconds: float) -> str:
    found = sum(bool(result.faults) for result in results)
    kinds = Counter(kind for result in results for kind in set(result.kinds))
    lines = [
        f"{len(results)} mutants of {seeds} checkpoints in {seconds:.0f} s, {found} with a fault, slowest "
        f"{max((result.seconds for result in results), default=0):.1f} s",
        "changes: " + ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())),
        "",
        "| loader | tried | refused | refused by the library | served | as its dense twin, not finite | fault |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for loader in LOADERS:
        told = Counter(result.outcomes[loader] for result in results if loader in result.outcomes)
        if told:
            counts = [told[word] for word in ("refused", "theirs", "served", "overflows", "fault")]
            lines.append(f"| {loader} | {sum(told.values())} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
