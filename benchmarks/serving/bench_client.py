"""Load a running server with vLLM's own client, `vllm bench serve`, and read back its figures."""

import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.server import ServerError, VllmServer, vllm_command

# Requests that are sent first and not counted: the server's caches are cold.
WARMUPS = 4


@dataclass(frozen=True)
class Load:
    """What the client sends: random prompts of fixed lengths.

    Attributes:
        rate: requests a second, drawn as a Poisson process; infinity sends all of them at once.
        num_prompts: requests in all.
        input_len: tokens of a prompt.
        output_len: tokens of an answer; end-of-text is ignored, so every answer has as many.
        max_concurrency: requests in flight at most; None for no limit.
    """

    rate: float
    num_prompts: int
    input_len: int
    output_len: int
    max_concurrency: int | None = None

    def __str__(self) -> str:
        rate = "all at once" if math.isinf(self.rate) else f"{self.rate:g} requests/s"
        return rate if self.max_concurrency is None else f"{rate}, {self.max_concurrency} in flight at most"


@dataclass(frozen=True)
class LoadResult:
    """Figures of the client: medians over tokens or requests. TTFT: time to first token; TPOT, ITL: between tokens."""

    output_tokens_per_s: float
    median_ttft_ms: float
    median_tpot_ms: float
    median_itl_ms: float


def run_load(server: VllmServer, load: Load) -> LoadResult:
    """Run the client to its end.

    Raises:
        ServerError: the client failed, or some of its requests did.
    """
    with tempfile.TemporaryDirectory(prefix="resmoe-bench-") as scratch:
        command = [
            vllm_command(), "bench", "serve", "--backend", "vllm", "--base-url", server.base_url,
            "--model", server.model, "--dataset-name", "random", "--random-input-len", str(load.input_len),
            "--random-output-len", str(load.output_len), "--num-prompts", str(load.num_prompts),
            "--request-rate", str(load.rate), "--ignore-eos", "--temperature", "0", "--seed", "0",
            "--num-warmups", str(WARMUPS),
            "--percentile-metrics", "ttft,tpot,itl", "--save-result", "--result-dir", scratch,
            "--result-filename", "result.json",
        ]  # fmt: skip
        if load.max_concurrency is not None:
            command += ["--max-concurrency", str(load.max_concurrency)]
        # On a terminal the client's own progress bar is shown.
        stderr = None if sys.stderr.isatty() else subprocess.STDOUT
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)
        if done.returncode:
            tail = "\n".join(done.stdout.splitlines()[-20:])
            raise ServerError(f"`vllm bench serve` ended with exit code {done.returncode}. Its end:\n{tail}")
        result = json.loads((Path(scratch) / "result.json").read_text())
    if result["completed"] != load.num_prompts:
        raise ServerError(f"only {result['completed']} of {load.num_prompts} requests were answered")
    return LoadResult(
        output_tokens_per_s=result["output_throughput"],
        median_ttft_ms=result["median_ttft_ms"],
        median_tpot_ms=result["median_tpot_ms"],
        median_itl_ms=result["median_itl_ms"],
    )
