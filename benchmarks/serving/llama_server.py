"""llama.cpp's own server as a process: by the library that the package xllamacpp brings, or by a binary of yours.

python -m benchmarks.serving.llama_server MODEL.gguf PORT THREADS SLOTS CONTEXT
"""

import importlib
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from typing_extensions import override

from benchmarks.serving.server import VllmServer


class LlamaServer(VllmServer):
    """A GGUF file behind llama.cpp's server; the same to clients as ``VllmServer``.

    Args:
        gguf: the file.
        threads: that compute.
        slots: requests that are answered at the same time.
        context: tokens of each.
        binary: a `llama-server`; None for xllamacpp's.
        console: shows the wait.
    """

    def __init__(
        self, gguf: Path, threads: int, slots: int, context: int, binary: str | None = None, *, console: Console
    ) -> None:
        super().__init__(gguf, console=console)
        port, tokens = str(self.port), str(context * slots)
        if binary is None:
            module = [sys.executable, "-m", __name__]
            self.command = [*module, str(gguf), port, str(threads), str(slots), tokens]
        else:
            self.command = [
                binary, "-m", str(gguf), "--port", port, "-t", str(threads), "-tb", str(threads), "-np", str(slots),
                "-c", tokens,
            ]  # fmt: skip

    @property
    @override
    def shown_command(self) -> str:
        return shlex.join(self.command)


def features() -> str | None:
    """The version of xllamacpp and the instructions that its llama.cpp was built for; None where it is missing."""
    try:
        library: Any = importlib.import_module("xllamacpp")
    except ImportError:
        return None
    return f"xllamacpp {library.__version__}; {library.get_system_info().strip(' |')}"


def serve(gguf: str, port: int, threads: int, slots: int, tokens: int) -> None:
    """Serve until the process is ended."""
    library: Any = importlib.import_module("xllamacpp")
    params = library.CommonParams()
    params.model.path = gguf
    params.port = port
    params.n_ctx = tokens
    params.n_parallel = slots
    params.n_gpu_layers = 0
    params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = library.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    serve(sys.argv[1], *map(int, sys.argv[2:]))
