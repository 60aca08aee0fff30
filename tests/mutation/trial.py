"""One run of tests in a forked process: with every line as it is, watched, or with one mutant in a module's place."""

import ast
import gc
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest

from tests.mutation.targets import REPOSITORY

# Read by a child's own subprocesses, through the sitecustomize.py that lies first on their path.
_MODULE_VARIABLE = "RESMOE_MUTANT_MODULE"
_SOURCE_VARIABLE = "RESMOE_MUTANT_SOURCE"
_SITECUSTOMIZE = f"""
import os, sys, importlib.util
from importlib.machinery import SourceFileLoader


class _Loader(SourceFileLoader):
    def get_code(self, name):
        with open(os.environ["{_SOURCE_VARIABLE}"], encoding="utf-8") as stream:
            return compile(stream.read(), self.path, "exec")


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != os.environ.get("{_MODULE_VARIABLE}"):
            return None
        file = os.path.join({str(REPOSITORY)!r}, *name.split(".")) + ".py"
        return importlib.util.spec_from_file_location(name, file, loader=_Loader(name, file))


sys.meta_path.insert(0, _Finder)
"""
_NOT_EXCHANGED = 71
_OPTIONS = (
    "-q",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
    "-p",
    "no:cov",
    "-p",
    "no:randomly",
    "--no-header",
    "-s",
    "--tb=short",
    "-m",
    "not slow and not vllm and not gpu",
)


@dataclass
class Watched:
    """What a test needed.

    Attributes:
        seconds: with its own set-up.
        lines: line numbers that it reached, by file relative to the repository.
    """

    seconds: float = 0.0
    lines: dict[str, list[int]] = field(default_factory=dict)


# What the imports of a collection reach stands in the same table, under a name that no test has.
IMPORTS = "imports"


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: pytest's exit code, or None for one that was stopped; the test that failed first."""

    code: int | None
    failed: str | None
    seconds: float


class _FirstFailure:
    """Remembers the first test that failed, or could not be collected."""

    def __init__(self) -> None:
        self.name: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.name is None:
            self.name = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.name is None:
            self.name = f"{report.nodeid}: not collected"


class _Chosen:
    """Keeps the chosen tests alone, in their order."""

    def __init__(self, chosen: list[str]) -> None:
        self.place = {name: number for number, name in enumerate(chosen)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self.place), key=lambda item: self.place[item.nodeid]
        )


class _Watch:
    """Which lines of the watched files each test reaches, those of the fixtures that it shares included."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.names = {str(REPOSITORY / file): str(file) for file in files}
        self.tests: dict[str, Watched] = {}
        self.fixtures: dict[int, set[tuple[str, int]]] = {}
        self.reached: list[set[tuple[str, int]]] = [set()]
        sys.settrace(self.trace)
        threading.settrace(self.trace)

    def trace(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        name = self.names.get(frame.f_code.co_filename)
        if name is None:
            return None

        def line(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
            self.reached[-1].add((name, frame.f_lineno))
            return line

        return line(frame, event, argument)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Any:
        self.reached.append(set())
        try:
            return (yield)
        finally:
            own = self.reached.pop()
            self.fixtures.setdefault(id(fixturedef), set()).update(own)
            self.reached[-1] |= own

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        if not self.tests:
            self.tests[IMPORTS] = _watched(0.0, self.reached[0])
        self.reached = [set()]
        started = time.monotonic()
        sys.settrace(self.trace)
        result = yield
        lines = set(self.reached[0])
        for definitions in getattr(item, "_fixtureinfo").name2fixturedefs.values():  # noqa: B009 - pytest's own
            for definition in definitions:
                lines |= self.fixtures.get(id(definition), set())
        self.tests[item.nodeid] = _watched(time.monotonic() - started, lines)
        return result


def _watched(seconds: float, lines: set[tuple[str, int]]) -> Watched:
    watched = Watched(seconds)
    for name, number in sorted(lines):
        watched.lines.setdefault(name, []).append(number)
    return watched


class _MutantLoader(SourceFileLoader):
    def __init__(self, name: str, path: str, tree: ast.Module) -> None:
        super().__init__(name, path)
        self.tree = tree

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.tree, self.path, "exec")


class _MutantFinder:
    def __init__(self, module: str, file: Path, tree: ast.Module) -> None:
        self.module, self.file, self.tree = module, file, tree

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != self.module:
            return None
        loader = _MutantLoader(name, str(self.file), self.tree)
        return importlib.util.spec_from_file_location(name, str(self.file), loader=loader)


def module_name(file: Path) -> str:
    """The name that a file, relative to the repository, is imported by."""
    return ".".join(file.with_suffix("").parts)


def watch(tests: Iterable[str], files: Iterable[Path], folder: Path) -> dict[str, Watched]:
    """Run tests as they are.

    Returns:
        by test, what it reached.
    Raises:
        SystemExit: a test fails: nothing could be learned from mutants.
    """
    result = folder / "watched.json"

    def body() -> int:
        watching = _Watch(files)
        code = pytest.main([*_OPTIONS, f"--basetemp={folder / 'tmp'}", *tests], plugins=[watching])
        sys.settrace(None)
        result.write_text(json.dumps({name: asdict(watched) for name, watched in watching.tests.items()}))
        return int(code)

    code = _in_child(body, folder / "watched.txt", timeout_s=3600)
    if code != 0:
        raise SystemExit(f"the tests are not green without a mutant:\n{(folder / 'watched.txt').read_text()[-3000:]}")
    return {name: Watched(**content) for name, content in json.loads(result.read_text()).items()}


@dataclass(frozen=True)
class Trial:
    """A mutant, and the tests that it must survive, in their order."""

    file: Path
    tree: ast.Module
    tests: tuple[str, ...]
    timeout_s: float


def try_in_place(trials: list[Trial], tests: Iterable[str], folder: Path, deadline: float) -> Iterator[Outcome | None]:
    """Try mutants of functions' bodies: tests are collected once, then each mutant gets a fork of that process.

    In it the functions' code is exchanged, wherever they have been imported to.

    Args:
        trials: what to try.
        tests: pytest's paths that hold the trials' tests.
        folder: for what the tests write.
        deadline: of ``time.monotonic()``, after which no trial is begun.
    Yields:
        outcomes by trial; None where the code can't be exchanged, so that the module has to be imported anew.
    """
    results = folder / "outcomes.jsonl"
    results.write_text("")

    def body() -> int:
        return int(
            pytest.main([*_OPTIONS, f"--basetemp={folder / 'tmp'}", *tests], plugins=[_Host(trials, results, deadline)])
        )

    _in_child(body, folder / "host.txt", timeout_s=24 * 3600)
    for line in results.read_text().splitlines():
        content = json.loads(line)
        yield None if content is None else Outcome(**content)


class _Host:
    """In place of pytest's loop over tests: a fork for each mutant, with a loop of its own."""

    def __init__(self, trials: list[Trial], results: Path, deadline: float) -> None:
        self.trials, self.results, self.deadline = trials, results, deadline

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        with self.results.open("a") as stream:
            for trial in self.trials:
                if time.monotonic() > self.deadline:
                    break
                outcome = self._try(session, trial, [items[name] for name in trial.tests])
                stream.write(json.dumps(outcome and asdict(outcome)) + "\n")
                stream.flush()
        return True

    def _try(self, session: pytest.Session, trial: Trial, items: list[pytest.Item]) -> Outcome | None:
        failed = self.results.with_name("failed.txt")
        failed.unlink(missing_ok=True)

        def body() -> int:
            _name_mutant(trial, failed.parent)
            if not _exchange_code(trial):
                return _NOT_EXCHANGED
            first = _FirstFailure()
            session.config.pluginmanager.register(first)
            for item, following in zip(items, [*items[1:], None], strict=True):
                session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if first.name is not None:
                    failed.write_text(first.name)
                    return 1
            return 0

        started = time.monotonic()
        code = _in_child(body, self.results.with_name("trial.txt"), trial.timeout_s)
        if code == _NOT_EXCHANGED:
            return None
        return Outcome(code, failed.read_text() if failed.exists() else None, time.monotonic() - started)


def _exchange_code(trial: Trial) -> bool:
    """Give the module's live functions the mutant's code; False if it has other free variables, or none is live."""
    path = str(REPOSITORY / trial.file)
    new = {(code.co_qualname, code.co_firstlineno): code for code in _codes(compile(trial.tree, path, "exec"))}
    exchanged = False
    for function in gc.get_objects():
        if isinstance(function, FunctionType) and function.__code__.co_filename == path:
            code = new.get((function.__code__.co_qualname, function.__code__.co_firstlineno))
            if code is None or code.co_freevars != function.__code__.co_freevars:
                return False
            function.__code__ = code
            exchanged = True
    return exchanged


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def try_imported(trial: Trial, folder: Path) -> Outcome:
    """Try a mutant by importing everything with it in its module's place. Nothing is written into the repository."""
    module, failed = module_name(trial.file), folder / "failed.txt"
    failed.unlink(missing_ok=True)

    def body() -> int:
        _name_mutant(trial, folder)
        sys.meta_path.insert(0, _MutantFinder(module, REPOSITORY / trial.file, trial.tree))
        files = list(dict.fromkeys(name.split("::")[0] for name in trial.tests))
        first = _FirstFailure()
        plugins = [_Chosen(list(trial.tests)), first]
        code = pytest.main([*_OPTIONS, "-x", f"--basetemp={folder / 'tmp'}", *files], plugins=plugins)
        failed.write_text(first.name or "")
        return int(code)

    started = time.monotonic()
    code = _in_child(body, folder / "trial.txt", trial.timeout_s)
    return Outcome(code, failed.read_text() if failed.exists() else None, time.monotonic() - started)


def _name_mutant(trial: Trial, folder: Path) -> None:
    """Tell the tests' own subprocesses of the mutant."""
    source, site = folder / "mutant.py", folder / "site"
    source.write_text(ast.unparse(trial.tree), encoding="utf-8")
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(_SITECUSTOMIZE, encoding="utf-8")
    os.environ[_MODULE_VARIABLE], os.environ[_SOURCE_VARIABLE] = module_name(trial.file), str(source)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])


def _in_child(body: Callable[[], int], output: Path, timeout_s: float) -> int | None:
    """Run ``body`` in a forked process of a session of its own; its exit code, or None once it is stopped."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            with output.open("w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            os.chdir(REPOSITORY)
            code = body()
        finally:
            sys.stdout.flush()
            os._exit(code)
    deadline = time.monotonic() + timeout_s
    code: int | None = None
    try:
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                child = 0
                break
            time.sleep(0.02)
    finally:
        if child:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return code
