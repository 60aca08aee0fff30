"""Start a real `vllm serve` process, wait until it is healthy, watch its memory, stop it with all its children."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil
from rich.console import Console

from benchmarks.harness.environment import collect_environment
from benchmarks.serving import resident_probe
from compress_tools.errors import ResMoEError

POLL_S = 0.25
# How long vLLM may take to end by itself.
STOP_S = 20
TAIL_LINES = 40
_LOADING = re.compile(r"Loading weights took ([\d.]+) seconds")


class ServerError(ResMoEError):
    """The server died, did not become healthy in time, or did not report what it was asked for."""


class VllmServer:
    """`vllm serve MODEL --port PORT` as a context manager; healthy inside the `with` block, gone after it.

    Once gone it may be entered again: on the same port, with an empty log.

    Args:
        model_dir: checkpoint directory; also the model's name for clients.
        options: further options of `vllm serve`; none by default.
        env: environment variables over this process's own.
        log_path: file for the server's output; a temporary one if None.
        timeout_s: longest wait for the server to become healthy.
        console: shows the wait.
    """

    def __init__(
        self,
        model_dir: str | Path,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        log_path: str | Path | None = None,
        timeout_s: float = 900,
        console: Console | None = None,
    ) -> None:
        self.model = str(model_dir)
        self.port = free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.command = [vllm_command(), "serve", self.model, "--port", str(self.port), *options]
        self.peak_rss_bytes = 0
        self.startup_s = 0.0
        self._cpu_seconds: dict[int, float] = {}
        self._scratch = tempfile.TemporaryDirectory(prefix="resmoe-serve-")
        self.log_path = Path(log_path) if log_path else Path(self._scratch.name) / "server.log"
        self._probe = resident_probe.Reader(Path(self._scratch.name) / "resident")
        self._env = self._probe.environment({**os.environ, **(env or {})})
        if collect_environment().gpu is None:
            # vLLM would take nearly all of the machine's memory for the KV cache.
            self._env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        self._timeout_s = timeout_s
        self._console = console or Console(stderr=True)

    def __enter__(self) -> Self:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
            # By default SIGTERM ends this process without leaving the `with` block: the server would live on.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("w") as log:
            # A session of its own: Ctrl-C reaches this process alone, which then stops the server in order.
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=self._env, start_new_session=True
            )
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch_memory, daemon=True)
        self._watcher.start()
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def shown_command(self) -> str:
        """The command as a person would type it, with the cache that was set for a CPU."""
        cache = self._env.get("VLLM_CPU_KVCACHE_SPACE")
        return shlex.join([*([f"VLLM_CPU_KVCACHE_SPACE={cache}"] if cache else []), "vllm", *self.command[1:]])

    @property
    def log(self) -> str:
        """Everything that the server has printed so far."""
        return self.log_path.read_text(errors="replace")

    @property
    def weight_load_s(self) -> float | None:
        """Seconds that vLLM says it spent loading weights; with several workers the slowest, None if unsaid."""
        return max(map(float, _LOADING.findall(self.log)), default=None)

    def resident_expert_bytes(self) -> dict[str, int]:
        """Bytes of expert tensors by MoE layer, counted just now inside the server's own processes."""
        try:
            return self._probe.read()
        except TimeoutError as err:
            raise ServerError(f"{err}; VLLM_PLUGINS must not be set. Log: {self.log_path}") from err

    def cpu_seconds(self) -> float:
        """Processor time of the server's processes so far; of those that have ended, what was last seen."""
        for process in self._family():
            with suppress(psutil.NoSuchProcess):
                own = process.cpu_times()
                self._cpu_seconds[process.pid] = own.user + own.system
        return sum(self._cpu_seconds.values())

    def resident_bytes(self) -> int:
        """Resident memory of the server's processes now, summed; what they share counts for each."""
        resident = 0
        for process in self._family():
            with suppress(psutil.NoSuchProcess):
                resident += process.memory_info().rss
        return resident

    def stop(self) -> None:
        """End the server and every process it started: politely first, by force when that takes too long."""
        family = self._family()
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        # vLLM ends its own children; what is left has lost its parent.
        _, left = psutil.wait_procs(family, timeout=1)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._wait_for_end(left)

    def kill(self) -> None:
        """SIGKILL to all of its processes at once, as where a container is killed or memory has run out.

        Raises:
            ServerError: a process outlived it.
        """
        family = self._family()
        os.killpg(self._process.pid, signal.SIGKILL)
        if left := self._wait_for_end(family):
            raise ServerError(f"`{shlex.join(self.command)}` was killed, and {left} are still there")

    def _wait_for_end(self, processes: list[psutil.Process]) -> list[psutil.Process]:
        """Wait for them, and for the server itself; which of them are still there."""
        _, left = psutil.wait_procs(processes, timeout=10)
        self._process.wait()
        self._stopping.set()
        self._watcher.join()
        return left

    def _wait_until_healthy(self) -> None:
        started = time.perf_counter()
        shown = self.shown_command
        with self._console.status(shown) as status:
            while not _answers(f"{self.base_url}/health"):
                waited = time.perf_counter() - started
                if self._process.poll() is not None:
                    raise ServerError(self._failure(f"ended with exit code {self._process.returncode}"))
                if waited > self._timeout_s:
                    raise ServerError(self._failure(f"was not healthy after {self._timeout_s:.0f} s"))
                status.update(f"{shown}: {waited:.0f} s")
                time.sleep(POLL_S)
        self.startup_s = time.perf_counter() - started

    def _failure(self, what: str) -> str:
        tail = "\n".join(self.log.splitlines()[-TAIL_LINES:])
        return f"`{shlex.join(self.command)}` {what}. The end of its log:\n{tail}"

    def _family(self) -> list[psutil.Process]:
        try:
            parent = psutil.Process(self._process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _watch_memory(self) -> None:
        while not self._stopping.wait(POLL_S):
            self.peak_rss_bytes = max(self.peak_rss_bytes, self.resident_bytes())


def free_port() -> int:
    """A TCP port that nothing on this machine listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def vllm_command() -> str:
    """The `vllm` beside this interpreter, so that an environment need not be activated; else the one on PATH."""
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if found is None:
        raise ServerError(f"found no `vllm` command beside {sys.executable} or on PATH; `make venv` installs it")
    return found


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
