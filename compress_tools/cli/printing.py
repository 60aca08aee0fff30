"""What commands print: results on stdout, progress on stderr, commands that a shell can read back."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from compress_tools.architectures.registry import find_architecture
from compress_tools.cli import tables
from compress_tools.damage import damage_warning
from compress_tools.output.model_card import serve_words
from compress_tools.output.staging import Staging
from compress_tools.output.trusted_code import must_be_trusted
from compress_tools.progress.listener import ProgressListener, Together
from compress_tools.progress.live import LiveProgress
from compress_tools.progress.log import logged
from compress_tools.report import CompressionReport
from compress_tools.source.reader import CheckpointReader


@contextmanager
def progress_on_stderr(*, quiet: bool, dst: str | Path | None = None) -> Iterator[ProgressListener]:
    """Bars on a terminal, lines where stderr is none, neither if quiet; and the log file of ``dst``."""
    live = not quiet and sys.stderr.isatty()
    with logged(None if dst is None else Staging(dst).log_path, to_stderr=not quiet and not live) as lines:
        if live:
            with LiveProgress() as bars:
                yield Together(bars, lines)
        else:
            yield lines


def print_result(content: Any, human: Callable[[], Any], *, as_json: bool) -> None:
    """A result: as JSON, or what ``human`` makes of it."""
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        print_for_people(human())


def print_for_people(*lines: Any) -> None:
    """Tables and lines on stdout; a line is not broken, so that a command in it can be copied."""
    # A pipe has no width of its own; 120 columns keep the tables whole in a log.
    # Names of files and models are no markup.
    console = _Console(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False)
    for line in lines:
        console.print(line, soft_wrap=isinstance(line, str | Text))


class _Console(Console):
    """Leaves a reader of the pipe that goes away to ``main``, as ``print`` does."""

    def on_broken_pipe(self) -> None:
        """Called while the error is handled."""
        raise BrokenPipeError


def with_command(text: str, *words: object) -> Text:
    """A line that ends in a command, each word quoted as a shell needs it."""
    return Text.assemble(text + " ", (shlex.join(map(str, words)), "bold"))


def loud(text: str) -> Text:
    """A warning that is not to be missed where there is colour."""
    return Text(text, style="bold red")


def print_report(report: CompressionReport, dst: str, *, as_json: bool) -> None:
    """What a compression did, and what to do with it."""
    warning = damage_warning(report.errors)
    content = report.content() | ({} if warning is None else {"warning": warning})
    print_result(content, lambda: tables.report_table(report), as_json=as_json)
    if not as_json:
        if warning is not None:
            print_for_people(loud(warning))
        config = CheckpointReader(dst).config
        family, trust = find_architecture(config), must_be_trusted(Path(dst), config)
        runs_in = f"{family.title} runs in {family.runs_in}{', with trust_remote_code=True' if trust else ''}"
        print_for_people(
            with_command(f"Written to {dst}. Next:", *serve_words(dst, trust=trust))
            if family.vllm
            else f"Written to {dst}. {runs_in}."
        )
