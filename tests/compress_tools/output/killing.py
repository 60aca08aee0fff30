"""Work in a process of its own that kills itself, by SIGKILL, at a chosen event: no clean-up of any kind runs."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from compress_tools.progress.listener import stage_title

# One server that has imported everything forks each process, in a tenth of a second instead of seven.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["ot", "lap", "compress_tools.slices.merge", "compress_tools.pipeline", __name__])

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"}


def kill_me() -> None:
    """End this process as the out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


class KillAtChange:
    """Kills before the n-th change of the file system (create, rename, link, remove), counted from 1."""

    def __init__(self, number: int) -> None:
        self.left = number

    def arm(self) -> None:
        """Begin to count."""
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            self.left -= 1
            if self.left == 0:
                kill_me()


class KillInStage:
    """Kills at the first step of a stage, or at its beginning if it has no steps."""

    def __init__(self, text: str) -> None:
        self.text = text

    def arm(self) -> None:
        """Nothing to prepare: this is also the listener."""

    def stage(self, text: str, total: int | None, layer: int | None = None) -> None:
        self._armed = stage_title(text, layer) == self.text
        if self._armed and text.endswith("writing"):
            kill_me()

    def step(self) -> None:
        if self._armed:
            kill_me()

    def start(self, total: int, unit: str = "shard") -> None: ...
    def layer_done(self, report: object, seconds: dict[str, float]) -> None: ...
    def shard_done(self) -> None: ...
    def say(self, text: str) -> None: ...


class KillInShard:
    """Kills half-way through writing a shard: the file is there, and too short."""

    def __init__(self, number: int) -> None:
        self.number = number

    def arm(self) -> None:
        """Put a torn write in place of the whole one."""
        from compress_tools.output import writer

        def torn(tensors: dict[str, Any], file: Path, **options: Any) -> None:
            save_file(tensors, file, **options)
            self.number -= 1
            if self.number == 0:
                os.truncate(file, file.stat().st_size // 2)
                kill_me()

        writer.save_file = torn


Kill = KillAtChange | KillInStage | KillInShard


def _child(work: Callable[..., object], kill: Kill, options: dict[str, Any]) -> None:
    kill.arm()
    if isinstance(kill, KillInStage):
        options = {**options, "progress": kill}
    work(**options)


def killed(work: Callable[..., object], kill: Kill, **options: Any) -> bool:
    """Run ``work(**options)`` in a process of its own.

    Returns:
        True if the kill came, False if the work was done before.
    """
    process = _CONTEXT.Process(target=_child, args=(work, kill, options))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"exit code {process.exitcode}"
    return process.exitcode != 0
