"""`make mutate`: does any test see a small wrong edit? By hand, not in CI; docs/notes/mutation.md has a table."""

import argparse
import importlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.mutation.explained import Explanations
from tests.mutation.mutants import Mutant, make_mutants
from tests.mutation.targets import REPOSITORY, TARGETS, Target
from tests.mutation.trial import IMPORTS, Outcome, Trial, Watched, try_imported, try_in_place, watch

_PRELOADED = ("torch", "transformers", "pydantic", "hypothesis", "scipy.optimize", "safetensors.torch", "click", "rich")


@dataclass(frozen=True)
class Result:
    """One mutant, tried."""

    target: str
    file: str
    line: int
    mutant: str
    state: str  # killed, survived, explained
    by: str
    seconds: float


def main() -> None:
    """Parse, try, print."""
    options = _options()
    deadline = time.monotonic() + 60 * options.minutes
    explanations = Explanations.read()
    _preload(_PRELOADED)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="resmoe-mutation-") as name:
        for target in TARGETS:
            files = [file for file in target.files() if _asked(target, file, options.only)]
            if not files or time.monotonic() > deadline:
                continue
            _preload(target.preload)
            folder = Path(name)
            # What falls out of a mutant is no example for anybody's next run.
            os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")
            print(f"{target.name}: watching its tests", file=sys.stderr)
            tests = options.tests or [path for path in target.tests if (REPOSITORY / path).exists()]
            for file in files:
                keys = [mutant.key for mutant in make_mutants((REPOSITORY / file).read_text(encoding="utf-8"))]
                for stale in explanations.stale(str(file), keys):
                    print(f"explained, but no such mutant is left: {file}: {stale}", file=sys.stderr)
            watched = watch(tests, files, folder)
            chosen = [
                (file, mutant)
                for file in files
                for mutant in _sample(file, options.per_module, options.seed)
                if options.mutant in mutant.key
            ]
            for result in _try_all(target, tests, chosen, watched, explanations, folder, options.tests_s, deadline):
                results.append(result)
                if result.state != "killed" or options.verbose:
                    print(
                        f"{result.state:9} {result.file}:{result.line} {result.mutant} [{result.by}]", file=sys.stderr
                    )
                if options.json:
                    Path(options.json).write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")
    print(_table(results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make mutate", description=__doc__)
    parser.add_argument("only", nargs="*", help="names of targets, or parts of files' paths; default: everything")
    parser.add_argument("--tests", nargs="+", help="pytest's paths in place of the targets' own")
    parser.add_argument("--per-module", type=int, default=40, help="mutants of a module; 0: all")
    parser.add_argument("--minutes", type=float, default=60, help="no mutant is begun after so many")
    parser.add_argument("--tests-s", type=float, default=20, help="seconds of tests that a mutant must survive")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--mutant", default="", help="only mutants whose text holds this")
    parser.add_argument("--json", help="file that takes every result")
    parser.add_argument("--verbose", action="store_true", help="print killed mutants too")
    return parser.parse_args()


def _preload(modules: tuple[str, ...]) -> None:
    """Import what takes seconds once, before forks; nothing of this repository, which each trial imports anew."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    for module in modules:
        importlib.import_module(module)
    ours = [name for name in sys.modules if name.split(".")[0] in ("compress_tools", "resmoe_vllm")]
    for name in ours:
        del sys.modules[name]


def _asked(target: Target, file: Path, only: list[str]) -> bool:
    return not only or any(text == target.name or text in str(file) for text in only)


def _sample(file: Path, count: int, seed: int) -> list[Mutant]:
    """Up to ``count`` mutants, spread over the module's statements, in the file's order.

    At most a sixth are of what an import evaluates: each of those takes several seconds.
    """
    mutants = list(make_mutants((REPOSITORY / file).read_text(encoding="utf-8")))
    if not count or count >= len(mutants):
        return mutants
    generator = random.Random(f"{seed} {file}")
    inside = [mutant for mutant in mutants if mutant.in_function]
    outside = _spread([mutant for mutant in mutants if not mutant.in_function], max(1, count // 6), generator)
    if not inside:
        outside = _spread(mutants, count, generator)
    taken = outside + _spread(inside, count - len(outside), generator)
    return sorted(taken, key=lambda mutant: (mutant.line, mutant.key))


def _spread(mutants: list[Mutant], count: int, generator: random.Random) -> list[Mutant]:
    """One mutant of each statement in a random order, then a second of each, and so on."""
    by_statement: dict[int, list[Mutant]] = {}
    for mutant in mutants:
        by_statement.setdefault(mutant.line, []).append(mutant)
    for own in by_statement.values():
        generator.shuffle(own)
    order = list(by_statement.values())
    generator.shuffle(order)
    taken: list[Mutant] = []
    while len(taken) < min(count, len(mutants)):
        taken += [own.pop() for own in order if own][: count - len(taken)]
    return taken


def _try_all(
    target: Target,
    paths: list[str],
    chosen: list[tuple[Path, Mutant]],
    watched: dict[str, Watched],
    explanations: Explanations,
    folder: Path,
    tests_s: float,
    deadline: float,
) -> Iterator[Result]:
    at_import = watched.pop(IMPORTS)
    trials: list[Trial] = []
    for file, mutant in chosen:
        tests = tuple(_tests_for(str(file), mutant.line, watched, tests_s))
        normal = sum(watched[name].seconds for name in tests)
        trials.append(Trial(file, mutant.tree, tests, timeout_s=30 + 4 * normal))
    in_place = [number for number, (_, mutant) in enumerate(chosen) if mutant.in_function and trials[number].tests]
    outcomes: dict[int, Outcome | None] = dict.fromkeys(
        number for number, trial in enumerate(trials) if not trial.tests
    )
    found = try_in_place([trials[number] for number in in_place], paths, folder, deadline)
    for number, outcome in zip(in_place, found, strict=False):
        file, mutant = chosen[number]
        again = outcome is None or (outcome.code == 0 and mutant.line in at_import.lines.get(str(file), ()))
        if not again:
            outcomes[number] = outcome
    for number, (file, mutant) in enumerate(chosen):
        if number not in outcomes:
            if time.monotonic() > deadline:
                print(f"no time left for {file}:{mutant.line}", file=sys.stderr)
                continue
            outcomes[number] = try_imported(trials[number], folder)
        yield _result(target, file, mutant, trials[number], outcomes[number], explanations)


def _result(
    target: Target, file: Path, mutant: Mutant, trial: Trial, outcome: Outcome | None, explanations: Explanations
) -> Result:
    reason = explanations.reason(str(file), mutant.key)
    if outcome is None:
        state, by = "survived", "no test reaches it"
    elif outcome.code == 0:
        state, by = "survived", f"{len(trial.tests)} tests"
    else:
        state, by = "killed", outcome.failed or ("stopped" if outcome.code is None else f"exit {outcome.code}")
    if state == "survived" and reason is not None:
        state, by = "explained", reason
    return Result(
        target.name, str(file), mutant.line, mutant.key, state, by, round(outcome.seconds if outcome else 0, 1)
    )


def _tests_for(file: str, line: int, watched: dict[str, Watched], tests_s: float) -> Iterator[str]:
    """Tests that reach the line, the quickest first, until their time is spent; all where only an import does."""
    reaching = [name for name, own in watched.items() if line in own.lines.get(file, ())]
    seconds = 0.0
    for name in sorted(reaching or watched, key=lambda name: watched[name].seconds):
        yield name
        seconds += watched[name].seconds
        if seconds > tests_s:
            return


def _table(results: list[Result]) -> str:
    """Markdown: a row a module; the share counts explained mutants as seen."""
    rows = [
        "| module | mutants | killed | explained | survived | killed or explained |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.file, []).append(result)
    groups["**all**"] = results
    for name, own in groups.items():
        counts = [sum(one.state == state for one in own) for state in ("killed", "explained", "survived")]
        share = f"{100 * (counts[0] + counts[1]) / len(own):.0f} %" if own else ""
        rows.append(f"| {name} | {len(own)} | {' | '.join(map(str, counts))} | {share} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
