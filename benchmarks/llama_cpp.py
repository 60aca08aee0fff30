"""`python -m benchmarks.llama_cpp`: llama.cpp, vLLM dense and this project, each serving the same synthetic model.

An OLMoE of random weights at its true shape is written as a checkpoint, compressed, and written as GGUF. First the
probabilities of llama.cpp's bf16 model are compared with those of vLLM's dense one: nothing is timed unless they
agree. Then each is served, with as many threads, and asked the same: one stream, a long prompt, eight at once. Forms
are written when their turn comes and removed after it.

Needs xllamacpp and gguf, `pip install 'resmoe[llama-cpp]'`; or a `llama-server` of your own by ``--llama-server``.
"""

import importlib.util
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import httpx
from rich.console import Console

from benchmarks.harness.quiet import Noise, QuietMachine, process_seconds
from benchmarks.harness.rows import Row, print_rows, write_rows
from benchmarks.harness.shapes import SHAPES, MoEShape
from benchmarks.models.gguf_checkpoint import FORMS, write_gguf
from benchmarks.models.synthetic_checkpoint import CONTEXT, TOKENS, write_compressed, write_dense
from benchmarks.serve import CACHE
from benchmarks.serving.llama_server import LlamaServer, features
from benchmarks.serving.server import VllmServer
from compress_tools.errors import ConfigError, ResMoEError

SHAPE = "OLMoE-1B-7B"
# What this project serves, by name: options of `resmoe compress`, whose rest is in 8 bits, as llama.cpp's.
OURS: dict[str, dict[str, Any]] = {
    "ResMoE trellis 4 bits": {"method": "trellis", "bits": 4, "center_bits": 8, "rest_bits": 8},
    "ResMoE codes 4 bits": {"method": "quantize", "bits": 4, "center_bits": 8, "rest_bits": 8},
}
DENSE = "vLLM dense"
INPUT, OUTPUT, LONG_INPUT, AT_ONCE = 64, 32, 512, 8
# A token's time beside llama.cpp's with as many bits; first tokens beside dense.
TARGET_TOKEN, TARGET_FIRST, SAME_BITS = 1.15, 1.0, "llama.cpp Q4_0"
# Both compute in bf16, in other orders: their logarithms of probabilities may differ by this, and their choice where
# the two best are nearer than twice that.
TOLERANCE = 0.1
PROMPTS_COMPARED, PROBABILITIES = 12, 5


@dataclass(frozen=True)
class Answer:
    """One streamed request: seconds to the first token, and from the first to the last."""

    first_s: float
    rest_s: float
    tokens: int

    @property
    def token_s(self) -> float:
        """A token's time."""
        return self.rest_s / max(self.tokens - 1, 1)


@dataclass(frozen=True)
class Served:
    """What one model was measured at, before it is judged.

    Attributes:
        figures: by name: value, unit and what was around it.
    """

    model: str
    threads: int
    figures: dict[str, tuple[float, str, Noise | None]]


class Asker:
    """Asks a running server, the same of each kind.

    Args:
        server: running.
        seed: of the prompts.
    """

    def __init__(self, server: VllmServer, seed: int = 0) -> None:
        self._url, self._model = server.base_url, server.model
        self._is_llama = isinstance(server, LlamaServer)
        self._random = random.Random(seed)

    def prompt(self, length: int) -> list[int]:
        """A fresh one, so that no server finds its beginning in a cache."""
        return [self._random.randrange(1, TOKENS) for _ in range(length)]

    def ask(self, prompt: list[int], tokens: int) -> Answer:
        """Stream exactly so many tokens."""
        body: dict[str, Any] = {
            "model": self._model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True,
            "ignore_eos": True,
        }  # fmt: skip
        if self._is_llama:
            body["cache_prompt"] = False
        else:
            # A token whose bytes are only the beginning of a character has no text.
            body["return_token_ids"] = True
        begun = time.perf_counter()
        first = last = None
        with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=600) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                # llama.cpp's last chunk has no token, only a reason.
                if line.startswith("data: {") and _has_token(json.loads(line[6:])):
                    last = time.perf_counter()
                    first = first or last
        if first is None or last is None:
            raise ResMoEError(f"{self._model} answered without a token")
        return Answer(first - begun, last - first, tokens)

    def probabilities(self, prompt: list[int]) -> dict[int, float]:
        """The likeliest next tokens and the logarithms of their probabilities, the likeliest first."""
        if self._is_llama:
            body = {"prompt": prompt, "n_predict": 1, "n_probs": PROBABILITIES, "temperature": 0, "cache_prompt": False}
            found = httpx.post(f"{self._url}/completion", json=body, timeout=600).raise_for_status().json()
            return {one["id"]: one["logprob"] for one in found["completion_probabilities"][0]["top_logprobs"]}
        body = {
            "model": self._model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": PROBABILITIES,
            "return_tokens_as_token_ids": True,
        }  # fmt: skip
        found = httpx.post(f"{self._url}/v1/completions", json=body, timeout=600).raise_for_status().json()
        own = found["choices"][0]["logprobs"]["top_logprobs"][0]
        return {int(token.removeprefix("token_id:")): value for token, value in own.items()}


def _has_token(chunk: dict[str, Any]) -> bool:
    return any(
        choice.get("token_ids") or choice.get("text") or not choice.get("finish_reason")
        for choice in chunk.get("choices", [])
    )


def must_agree(one: list[dict[int, float]], other: list[dict[int, float]]) -> None:
    """Compare two models' likeliest next tokens of the same prompts.

    Raises:
        ResMoEError: the two are not the same model; or no prompt has a likeliest token that could tell.
    """
    told = 0
    for number, (mine, theirs) in enumerate(zip(one, other, strict=True)):
        far = max((abs(mine[token] - theirs[token]) for token in mine.keys() & theirs.keys()), default=float("inf"))
        ranked = sorted(mine, key=lambda token: -mine[token])
        clear = mine[ranked[0]] - mine[ranked[1]] > 2 * TOLERANCE
        told += clear
        if far > TOLERANCE or (clear and max(theirs, key=lambda token: theirs[token]) != ranked[0]):
            raise ResMoEError(
                f"llama.cpp's bf16 model and vLLM's dense one differ at prompt {number}: {mine} and {theirs}; nothing "
                "is timed"
            )
    if not told:
        raise ResMoEError(f"no prompt of {len(one)} has a token that is clearly the likeliest; take more layers")


def measure(server: VllmServer, model: str, machine: QuietMachine, repeats: int) -> Served:
    """One stream, a long prompt, eight at once, memory."""
    machine.own_seconds = lambda: process_seconds() + server.cpu_seconds()
    asker = Asker(server)
    asker.ask(asker.prompt(INPUT), 4)

    def alone() -> list[Answer]:
        return [asker.ask(asker.prompt(INPUT), OUTPUT) for _ in range(repeats)]

    def long() -> list[Answer]:
        return [asker.ask(asker.prompt(LONG_INPUT), 1) for _ in range(repeats)]

    def together() -> list[Answer]:
        prompts = [asker.prompt(INPUT) for _ in range(AT_ONCE)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda prompt: asker.ask(prompt, OUTPUT), prompts))

    figures: dict[str, tuple[float, str, Noise | None]] = {}
    answers, noise = machine.measure(alone)
    figures["a token's time, one stream"] = 1e3 * statistics.median(one.token_s for one in answers), "ms", noise
    figures["first token, one prompt"] = 1e3 * statistics.median(one.first_s for one in answers), "ms", noise
    answers, noise = machine.measure(long)
    first = statistics.median(one.first_s for one in answers)
    figures[f"prompt of {LONG_INPUT} tokens"] = LONG_INPUT / first, "tokens/s", noise
    answers, noise = machine.measure(together)
    figures[f"first token, {AT_ONCE} prompts at once"] = (
        1e3 * statistics.median(one.first_s for one in answers), "ms", noise,
    )  # fmt: skip
    whole = max(one.first_s + one.rest_s for one in answers)
    figures[f"output, {AT_ONCE} at once"] = AT_ONCE * OUTPUT / whole, "tokens/s", noise
    figures["peak memory of the server's processes"] = server.peak_rss_bytes / 2**20, "MiB", None
    return Served(model, machine.threads, figures)


def rows(served: list[Served], machines: dict[int, QuietMachine], context: dict[str, Any]) -> list[Row]:
    """All figures, then ours against llama.cpp's and dense."""
    found = []
    by_name = {(one.model, one.threads): one.figures for one in served}
    for one in served:
        own = {"model": one.model, "threads": one.threads, **context}
        for what, (value, unit, noise) in one.figures.items():
            around = {} if noise is None else noise.context(machines[one.threads].best)
            found.append(Row(f"{one.model}, {_threads(one.threads)}: {what}", value, unit, context={**own, **around}))
    for one in served:
        if one.model not in OURS:
            continue
        token, first = "a token's time, one stream", [what for what in one.figures if what.startswith("first token")]
        for against, names, target in ((SAME_BITS, [token], TARGET_TOKEN), (DENSE, first, TARGET_FIRST)):
            base = by_name.get((against, one.threads))
            for what in names if base is not None else ():
                name = f"{one.model} against {against}, {_threads(one.threads)}: {what}"
                ratio = one.figures[what][0] / base[what][0]
                noises = [figures[what][2] for figures in (one.figures, base)]
                noisy = any(noise is not None and noise.is_noisy(machines[one.threads].best) for noise in noises)
                found.append(Row.at_most(name, ratio, "x", target, threads=one.threads, noisy=noisy, **context))
    return found


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}"


def vllm_server(model: Path, threads: int, console: Console) -> VllmServer:
    """`vllm serve` with its computing threads on the first cores; unbound it leaves one core to its front end."""
    cores = "0" if threads == 1 else f"0-{threads - 1}"
    return VllmServer(model, env={"VLLM_CPU_OMP_THREADS_BIND": cores, "OMP_NUM_THREADS": str(threads)}, console=console)


@contextmanager
def written(path: Path, write: Callable[[Path], None], console: Console) -> Iterator[Path]:
    """What ``write`` makes, for as long as it is needed."""
    console.print(f"writing {path.name}", highlight=False)
    write(path)
    try:
        yield path
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@click.command()
@click.option("--layers", default=8, show_default=True, type=click.IntRange(min=1), help="Decoder layers.")
@click.option("--experts", type=click.IntRange(min=8), help="Of a layer. Default: 64.")
@click.option("--form", "forms", multiple=True, type=click.Choice(list(FORMS)), help="Of llama.cpp's. Default: all.")
@click.option(
    "--ours", "ours", multiple=True, type=click.Choice(list(OURS)), help="Of this project's. Default: the first."
)
@click.option("--threads", multiple=True, type=click.IntRange(min=1), help="Default: 1 2.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1), help="Requests for a median.")
@click.option("--patience", default=120.0, show_default=True, help="Seconds of waiting for a quiet machine, in all.")
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path), help="Where 15 GB may be written. Default: the cache."
)
@click.option("--llama-server", "binary", help="A llama-server of your own, built for this processor.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows to FILE.")
def main(  # noqa: PLR0913  click gives every option
    layers: int,
    experts: int | None,
    forms: tuple[str, ...],
    ours: tuple[str, ...],
    threads: tuple[int, ...],
    repeats: int,
    patience: float,
    folder: Path | None,
    binary: str | None,
    json_file: Path | None,
) -> None:
    """Time llama.cpp, vLLM dense and this project on the same model."""
    console = Console(stderr=True)
    chosen = Options(
        layers, experts, forms or tuple(FORMS), ours or tuple(OURS)[:1], threads or (1, 2), repeats, binary
    )
    machines = {count: QuietMachine(count, patience / len(chosen.threads), say=click.echo) for count in chosen.threads}
    served: list[Served] = []
    try:
        context = {"layers": layers, "experts": chosen.shape.experts, "llama_cpp": chosen.built()}
        for one in serve_all(chosen, machines, folder or CACHE, console):
            served.append(one)
            for what, (value, unit, _) in one.figures.items():
                console.print(f"{one.model}, {_threads(one.threads)}: {what}: {value:.4g} {unit}", highlight=False)
            if json_file:
                write_rows(rows(served, machines, context), json_file)
    except ResMoEError as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(err.exit_code)
    print_rows(rows(served, machines, context), title="The same synthetic OLMoE behind three servers")


@dataclass(frozen=True)
class Options:
    """What is served, and how."""

    layers: int
    experts: int | None
    forms: tuple[str, ...]
    ours: tuple[str, ...]
    threads: tuple[int, ...]
    repeats: int
    binary: str | None

    @property
    def shape(self) -> MoEShape:
        """Of the model."""
        return replace(SHAPES[SHAPE], experts=self.experts or SHAPES[SHAPE].experts)

    def built(self) -> str:
        """What llama.cpp's server is: its instructions decide its speed.

        Raises:
            ConfigError: there is none.
        """
        found = Path(self.binary).name if self.binary else features()
        if found is None or importlib.util.find_spec("gguf") is None:
            raise ConfigError("the package xllamacpp or gguf is not installed; pip install 'resmoe[llama-cpp]'")
        return found


def serve_all(chosen: Options, machines: dict[int, QuietMachine], folder: Path, console: Console) -> Iterator[Served]:
    """Each model with each number of threads, once llama.cpp's and vLLM's agree."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        dense = Path(scratch) / "dense"
        console.print("writing dense", highlight=False)
        write_dense(dense, chosen.shape, chosen.layers)
        compare(dense, Path(scratch) / "compared.gguf", chosen.binary, console)

        def measured(server: VllmServer, model: str, count: int) -> Served:
            with server:
                return measure(server, model, machines[count], chosen.repeats)

        for form in chosen.forms:
            write = partial(write_gguf, dense=dense, form=form)
            with written(Path(scratch) / f"{form}.gguf", write, console) as own:
                for count in chosen.threads:
                    server = LlamaServer(own, count, AT_ONCE, CONTEXT, chosen.binary, console=console)
                    yield measured(server, f"llama.cpp {form}", count)
        for count in chosen.threads:
            yield measured(vllm_server(dense, count, console), DENSE, count)
        for name in chosen.ours:
            compressed = partial(write_compressed, dense=dense, **OURS[name])
            with written(Path(scratch) / name.replace(" ", "-"), compressed, console) as own:
                for count in chosen.threads:
                    yield measured(vllm_server(own, count, console), name, count)


def compare(dense: Path, gguf: Path, binary: str | None, console: Console) -> None:
    """Raises ResMoEError unless llama.cpp's bf16 model is vLLM's dense one."""
    found = []
    with written(gguf, partial(write_gguf, dense=dense, form="bf16"), console) as own:
        for server in (LlamaServer(own, 1, 1, CONTEXT, binary, console=console), vllm_server(dense, 1, console)):
            with server:
                asker = Asker(server)
                found.append([asker.probabilities(asker.prompt(5 + 7 * one)) for one in range(PROMPTS_COMPARED)])
    must_agree(*found)
    console.print(f"llama.cpp's bf16 model and vLLM's dense one agree on {PROMPTS_COMPARED} prompts", highlight=False)


if __name__ == "__main__":
    main()
