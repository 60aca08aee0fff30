"""Progress as lines: on stderr where no terminal is, and in the log file beside the destination."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from compress_tools.progress.eta import Eta
from compress_tools.progress.listener import stage_title
from compress_tools.progress.text import human_bytes, human_s
from compress_tools.report import LayerReport

# A stage that takes long says how far it is this often.
STEPS_EVERY_S = 60.0

logger = logging.getLogger("compress_tools")
_FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")


class LogProgress:
    """One line for each stage, layer and remark, with the time left.

    Args:
        now: clock in seconds.
    Attributes:
        has_begun: work was begun, so nothing is left to refuse.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._eta = Eta(now)
        self.has_begun = False
        self._unit, self._text, self._steps, self._said = "shard", "", 0, 0.0
        self._total: int | None = None

    def start(self, total: int, unit: str = "shard") -> None:
        """See ``ProgressListener``."""
        self.has_begun = True
        self._eta.start(total, unit)
        self._unit = unit
        logger.info("%d %ss to go", total, unit)

    def stage(self, text: str, total: int | None, layer: int | None = None) -> None:
        """See ``ProgressListener``."""
        self._eta.stage(text)
        self._text, self._total, self._steps, self._said = stage_title(text, layer), total, 0, self._now()
        logger.info("%s%s", self._text, self._left())

    def step(self) -> None:
        """See ``ProgressListener``."""
        self._steps += 1
        if self._now() - self._said >= STEPS_EVERY_S:
            self._said = self._now()
            of = "" if self._total is None else f" of {self._total}"
            logger.info("%s: step %d%s%s", self._text, self._steps, of, self._left())

    def layer_done(self, report: LayerReport, seconds: dict[str, float]) -> None:
        """See ``ProgressListener``."""
        self._eta.layer_done()
        logger.info(
            "layer %d done: relative error %.6f, %s to %s (%.3f); %s",
            report.layer,
            report.relative_error,
            human_bytes(report.bytes_before),
            human_bytes(report.bytes_after),
            report.bytes_after / report.bytes_before,
            ", ".join(f"{stage} {taken:.2f} s" for stage, taken in seconds.items()),
        )

    def shard_done(self) -> None:
        """See ``ProgressListener``."""
        self._eta.shard_done()
        logger.info("%s %d of %d done%s", self._unit, self._eta.done, self._eta.total, self._left())

    def say(self, text: str) -> None:
        """See ``ProgressListener``."""
        logger.info("%s", text)

    def _left(self) -> str:
        stage, whole = self._eta.stage_s, self._eta.whole_s
        parts = [f"stage {human_s(stage)}"] if stage is not None else []
        parts += [f"all {human_s(whole)}"] if whole is not None else []
        return f" (left: {', '.join(parts)})" if parts else ""


class LogFile(logging.Handler):
    """Appends each line by one write, so that a kill or a second process tears none; a full disk stops no work.

    Args:
        file: made with the first line.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.setFormatter(_FORMAT)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, (self.format(record) + "\n").encode())
            finally:
                os.close(descriptor)
        except OSError:
            # The run's own writes report what is wrong with the disk.
            pass


@contextmanager
def logged(file: Path | None, *, to_stderr: bool) -> Iterator[LogProgress]:
    """Send the lines to a file, to stderr, or both, while the block runs; an error goes to the file with its traceback.

    Nothing is written before work begins, so a refused request leaves no file.

    Args:
        file: appended to; None for none.
        to_stderr: whether the lines go to stderr too.
    """
    handlers: list[logging.Handler] = [LogFile(file)] if file is not None else []
    if to_stderr:
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[-1].setFormatter(_FORMAT)
        # The command prints the error itself, in one sentence.
        handlers[-1].addFilter(lambda record: record.levelno < logging.ERROR)
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in handlers:
        logger.addHandler(handler)
    progress = LogProgress()
    try:
        yield progress
    except BaseException:
        if progress.has_begun:
            logger.exception("stopped")
        raise
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
