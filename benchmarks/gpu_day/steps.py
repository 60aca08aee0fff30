"""`python -m benchmarks.gpu_day.steps STEP --folder DIR`: one step of the day, in a process of its own.

Rows go to STEP.jsonl one by one. Exit codes: 0 done, 9 a result is wrong, 4 what it needs is not on this machine,
2 an argument is wrong or there is no GPU; Python's own 1 is a failure of the step.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu_day.__main__ import ABSENT, WRONG
from benchmarks.gpu_day.plan import STEPS
from benchmarks.harness.arguments import made_folder
from benchmarks.harness.environment import REPO, collect_environment
from benchmarks.harness.rows import Row

if TYPE_CHECKING:
    from benchmarks.serving.server import VllmServer

# largest error, as a share of the largest output; the kernels' sums are fp32, their products the model's dtype
LARGEST_ERROR = 2e-2
# of log-probabilities, as a share of how much they differ among themselves: another expert's weights make it 1
LARGEST_DEVIATION = 0.25
LAYERS = 4
# Of each of two servers; given, so that no server measures what is free while the other one starts.
KV_CACHE_BYTES = 2 << 30


class Records:
    """The rows of one step.

    Args:
        folder: the day's.
        step: its name.
        rehearse: marks every row, so that nobody takes it for a measurement.
    """

    def __init__(self, folder: Path, step: str, *, rehearse: bool) -> None:
        self.folder, self.step, self.rehearse = folder, step, rehearse
        self.file = folder / f"{step}.jsonl"
        self.device = "cpu" if rehearse else "cuda"

    def add(self, row: Row) -> None:
        """Write one row, at once."""
        marked = replace(row, context={**row.context, "step": self.step, "rehearsal": self.rehearse})
        with self.file.open("a") as file:
            file.write(json.dumps(marked.to_dict(collect_environment())) + "\n")
        print(f"{row.name}: {row.value} {row.unit}".rstrip(), flush=True)

    def done(self) -> set[str]:
        """Names of rows that an earlier visit wrote."""
        if not self.file.exists():
            return set()
        return {json.loads(line)["name"] for line in self.file.read_text().splitlines() if line.endswith("}")}


def environment(records: Records) -> int:
    """The card, and whether a kernel of Triton runs on it: the sorting of pairs, whose result is known exactly."""
    from resmoe_vllm.kernels.gpu.align import align
    from resmoe_vllm.kernels.reference import align_ref

    found = collect_environment()
    records.add(Row("card", found.gpu or "none", context={"driver": found.driver}))
    if not records.rehearse:
        card = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        records.add(Row("compute capability", f"{card.major}.{card.minor}"))
        records.add(Row("multiprocessors", card.multi_processor_count))
        records.add(Row("L2", card.L2_cache_size / 2**20, "MiB"))
        records.add(Row("free memory", free / 2**30, "GiB", context={"total_gib": total / 2**30}))
    for tool in ("compute-sanitizer", "ncu", "nsys"):
        records.add(Row(tool, shutil.which(tool) or "not on PATH"))
    ids = torch.randint(-1, 9, (50, 3), generator=torch.Generator().manual_seed(0)).int()
    pairs, blocks, length = align_ref(ids, 16, 9, None)
    sorted_pairs, block_experts, num_padded = align(ids.to(records.device), 16, 9, None)
    right = (
        num_padded.tolist() == [length]
        and torch.equal(sorted_pairs[:length].cpu(), pairs)
        and torch.equal(block_experts[: length // 16].cpu(), blocks)
    )
    records.add(Row("a first kernel runs", "right" if right else "WRONG"))
    return 0 if right else WRONG


def cases(*, rehearse: bool, small: bool) -> Iterator[tuple[str, str, int, int]]:
    """(method, dtype, T, K): for the sanitizer few of them, K = 1 and 8; in a rehearsal those that take seconds."""
    from benchmarks.compiled.layers import MATRIX_METHODS

    if rehearse:
        yield from [("quantize-4bit", "bfloat16", 3, 8)] if small else [("low-rank", "bfloat16", 3, 1)]
    elif small:
        for method in ("low-rank", "prune", "quantize-4bit", "trellis-4bit"):
            yield from ((method, "bfloat16", tokens, top_k) for tokens in (5, 80) for top_k in (1, 8))
    else:
        for method in MATRIX_METHODS:
            yield from ((method, "bfloat16", tokens, top_k) for tokens in (1, 13, 80, 300) for top_k in (1, 2, 8))
            yield (method, "float16", 13, 2)


def check(records: Records, *, small: bool, only: str | None = None) -> int:
    """Layers of odd sizes against the reference, with skipped pairs, and with other ranks' experts."""
    from benchmarks.gpu_day.layers import CHECKED, random_layer
    from resmoe_vllm.kernels.activation import SILU
    from resmoe_vllm.kernels.reference import fused_moe_ref
    from resmoe_vllm.ops import BoundLayer

    done = records.done()
    for method, dtype, tokens, top_k in cases(rehearse=records.rehearse, small=small):
        if only not in (None, method):
            continue
        weights = None
        for mapped in (False, True):
            name = f"{method}, {dtype}, T={tokens}, K={top_k}{', expert map' if mapped else ''}: error"
            if name in done:
                continue
            if weights is None:
                weights = random_layer(CHECKED, method, dtype, "cpu").weights
                kernel = BoundLayer([random_layer(CHECKED, method, dtype, records.device)], SILU, "cuda")
            generator = torch.Generator().manual_seed(tokens)
            x = torch.randn(tokens, CHECKED.hidden, generator=generator).to(getattr(torch, dtype))
            scores, ids = torch.rand(tokens, CHECKED.experts, generator=generator).topk(top_k)
            ids = ids.int()
            ids[-1, 0] = -1
            expert_map = torch.arange(8, -1, -1, dtype=torch.int32)
            expert_map[:2] = -1
            expected = fused_moe_ref(x, scores, ids, weights, SILU, expert_map if mapped else None)
            moved = [tensor.to(records.device) for tensor in (x, scores, ids, expert_map)]
            found = kernel(*moved[:3], moved[3] if mapped else None).cpu()
            # where every pair is skipped all is zero
            largest = expected.float().abs().max().clamp(min=1e-3)
            error = ((found.float() - expected.float()).abs().max() / largest).item()
            # NaN is no number that a row can hold, and compares with nothing
            error = error if math.isfinite(error) else 1e9
            records.add(Row.at_most(name, error, "", LARGEST_ERROR, method=method, tokens=tokens, top_k=top_k))
            if error > LARGEST_ERROR:
                print(f"{name}: WRONG", flush=True)
                return WRONG
    return 0


def correctness(records: Records) -> int:
    """``check`` of every way of coding, each in a process of its own: most of the time kernels are compiled."""
    from benchmarks.compiled.layers import MATRIX_METHODS

    if records.rehearse:
        return check(records, small=False)
    command = [sys.executable, "-m", "benchmarks.gpu_day.steps", "correctness", "--folder", str(records.folder)]
    running = {
        method: subprocess.Popen([*command, "--method", method], cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1"})
        for method in MATRIX_METHODS
    }
    codes = {method: process.wait() for method, process in running.items()}
    for method, code in codes.items():
        if code:
            print(f"{method}: exit code {code}", flush=True)
    return WRONG if WRONG in codes.values() else max(codes.values())


def sanitizer(records: Records) -> int:
    """The small check again under compute-sanitizer, each tensor in memory of its own; on a CPU without it."""
    command = [sys.executable, "-m", "benchmarks.gpu_day.steps", "small-check", "--folder", str(records.folder)]
    if records.rehearse:
        command = [*command, "--rehearse"]
    else:
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            records.add(Row("compute-sanitizer", "not on PATH, not run"))
            return ABSENT
        command = [tool, "--tool", "memcheck", "--error-exitcode", str(WRONG), "--target-processes", "all", *command]
    done = subprocess.run(command, cwd=REPO, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, check=False)
    records.add(Row("small check", "right" if done.returncode == 0 else "WRONG, or out of bounds: see the log"))
    return done.returncode


def profile(records: Records) -> int:
    """Microseconds of each kernel of a layer by torch's profiler, which needs no tool of its own."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from benchmarks.gpu_day.layers import PROFILED, REHEARSED, random_layer
    from benchmarks.harness.routing import route
    from resmoe_vllm.kernels.activation import SILU
    from resmoe_vllm.ops import BoundLayer

    shape = REHEARSED if records.rehearse else PROFILED
    calls = 1 if records.rehearse else 50
    methods = ("low-rank",) if records.rehearse else ("low-rank", "quantize-4bit", "trellis-4bit", "prune")
    activity = ProfilerActivity.CPU if records.rehearse else ProfilerActivity.CUDA
    time_of = "self_cpu_time_total" if records.rehearse else "self_device_time_total"
    for method in methods:
        kernel = BoundLayer([random_layer(shape, method, "bfloat16", records.device)], SILU, "cuda")
        for tokens in (1,) if records.rehearse else (1, 64):
            generator = torch.Generator(records.device).manual_seed(0)
            x = torch.randn(tokens, shape.hidden, generator=generator, device=records.device).bfloat16()
            inputs = x, *route(shape, tokens, generator)
            kernel(*inputs)
            with profiler(activities=[activity]) as found:
                for _ in range(calls):
                    kernel(*inputs)
                if not records.rehearse:
                    torch.cuda.synchronize()
            for event in found.key_averages():
                micros = getattr(event, time_of) / calls
                if micros > 0:
                    name = f"{shape.name} {method} T={tokens}: {event.key[:80]}"
                    launches = event.count / calls
                    records.add(Row(name, micros, "us a call", context={"launches": launches, "method": method}))
    return 0


def kernels(records: Records) -> int:
    """The table of `benchmarks.kernels`, and vLLM's 4-bit layer beside it."""
    if records.rehearse:
        from benchmarks.kernels.__main__ import check as check_kernels

        wrong = check_kernels("cpu", torch.float32, kinds=("dense",))
        records.add(Row("benchmarks.kernels, dense, in the interpreter", "WRONG" if wrong else "right"))
        return WRONG if wrong else 0
    file = records.folder / "kernels-table.json"
    command = [sys.executable, "-m", "benchmarks.kernels", "--minutes", "4", "--json", str(file)]
    done = subprocess.run(command, cwd=REPO, check=False)
    if file.exists():
        for found in json.loads(file.read_text())["rows"]:
            own = {name: found.pop(name) for name in ("name", "value", "unit", "target", "met")}
            records.add(Row(**own, context=found))
    # its own exit code for wrong results is 1
    return WRONG if done.returncode == 1 else done.returncode


def serve(records: Records, shape_name: str) -> int:
    """A random model and its restored twin, each behind `vllm serve`: log-probabilities first, then throughput."""
    from rich.console import Console

    from benchmarks.serve import compare, measure
    from benchmarks.serve import parse as serve_options

    layers = 1 if records.rehearse else LAYERS
    where = f"{shape_name}, {layers} layers"
    paths = serve_models(records, shape_name, layers)
    names = ("twin", "low-rank")
    loads = serve_options(["--num-prompts", "64", "--input-len", "256", "--output-len", "64", "--rates", "inf"])
    if records.rehearse:
        loads = serve_options(["--num-prompts", "2", "--input-len", "8", "--output-len", "8"])
        loads.rates = []
    rows: list[Row] = []
    with ExitStack() as stack:
        servers = start_servers(records, {name: paths[name] for name in names}, stack)
        found = {name: prompt_logprobs(server.base_url, server.model) for name, server in servers.items()}
        deviation = relative_deviation(found["low-rank"], found["twin"])
        label = f"{where}: deviation of log-probabilities from the restored twin"
        records.add(Row.at_most(label, deviation, "of their spread", LARGEST_DEVIATION, tokens=len(found["twin"])))
        if deviation > LARGEST_DEVIATION:
            return WRONG
        for name, server in servers.items():
            rows += measure(name, server, loads, Console(stderr=True))
    for row in [*rows, *compare(rows, list(names), targets=False)]:
        records.add(replace(row, name=f"{where}, {row.name}"))
    return 0


def start_servers(records: Records, paths: dict[str, Path], stack: ExitStack) -> dict[str, "VllmServer"]:
    """All of them at once, as each takes minutes; they share the card, and are asked one after the other."""
    from concurrent.futures import ThreadPoolExecutor

    from rich.console import Console

    from benchmarks.serving.server import VllmServer

    options = ["--max-model-len", "512"]
    options += ["--enforce-eager"] if records.rehearse else ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
    servers = {
        # the log stays, so that a server that does not start says why
        name: VllmServer(
            path,
            options,
            log_path=records.folder / f"{records.step}-{name}.log",
            timeout_s=200,
            console=Console(stderr=True, quiet=True),
        )
        for name, path in paths.items()
    }
    with ThreadPoolExecutor(len(servers)) as pool:
        for started in [pool.submit(stack.enter_context, server) for server in servers.values()]:
            started.result()
    return servers


def serve_models(records: Records, shape_name: str, layers: int) -> dict[str, Path]:
    """The compressed model and its twin, written if they are not there yet."""
    from benchmarks.gpu_day.layers import REHEARSED
    from benchmarks.harness.shapes import SHAPES
    from benchmarks.models.synthetic_checkpoint import write_compressed, write_dense
    from compress_tools.stored.restore import restore

    # heads of the published model's number, each of a size that vLLM has on a CPU
    shape = replace(REHEARSED, name=shape_name, hidden=512) if records.rehearse else SHAPES[shape_name]
    folder = records.folder / f"models-{shape_name}"
    paths = {name: folder / name for name in ("source", "twin", "low-rank")}
    folder.mkdir(parents=True, exist_ok=True)
    if not paths["source"].exists():
        write_dense(paths["source"], shape, layers)
    if not paths["low-rank"].exists():
        write_compressed(paths["low-rank"], paths["source"], method="low-rank", retain_ratio=0.25)
        enlarge_experts(paths["low-rank"], shape.hidden)
    if not paths["twin"].exists():
        restore(paths["low-rank"], paths["twin"])
    return paths


def enlarge_experts(checkpoint: Path, hidden: int) -> None:
    """Give random experts the size of trained ones: as they were written, the model's output hardly needs them."""
    from safetensors.torch import load_file, save_file

    for file in checkpoint.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            suffix = name.rpartition(".")[2]
            if suffix in ("resmoe_u", "resmoe_v"):
                rank = tensor.shape[1] if suffix == "resmoe_u" else tensor.shape[0]
                tensor.mul_((hidden * rank) ** -0.25 / tensor.float().std())
            elif suffix == "resmoe_center":
                tensor.mul_(hidden**-0.5 / tensor.float().std())
        save_file(tensors, file, metadata={"format": "pt"})


def prompt_logprobs(base_url: str, model: str) -> list[float]:
    """What a server gives to every token of fixed prompts."""
    import httpx

    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 1000, (length,), generator=generator).tolist() for length in (5, 40, 100, 17)]
    body = {"model": model, "prompt": prompts, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 0}
    answer = httpx.post(f"{base_url}/v1/completions", json=body, timeout=120).raise_for_status().json()
    # a first token has no prediction, and the last one is the answer
    return [value for choice in answer["choices"] for value in choice["logprobs"]["token_logprobs"][1:-1]]


def relative_deviation(found: list[float], twin: list[float]) -> float:
    """Mean difference as a share of the twin's own spread; infinite ones make it 1e9."""
    if len(found) != len(twin):
        return 1e9
    deviation = statistics.fmean(abs(a - b) for a, b in zip(found, twin, strict=True)) / statistics.pstdev(twin)
    return deviation if math.isfinite(deviation) else 1e9


RUN: dict[str, Callable[[Records], int]] = {
    "environment": environment,
    "sanitizer": sanitizer,
    "small-check": lambda records: check(records, small=True),
    "correctness": correctness,
    "profile": profile,
    "kernels": kernels,
    "serve-olmoe": lambda records: serve(records, "OLMoE-1B-7B"),
    "serve-qwen3": lambda records: serve(records, "Qwen3-30B-A3B"),
}


def main(argv: list[str] | None = None) -> Any:
    """Run one step; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_day.steps", description=__doc__)
    parser.add_argument("step", choices=[*(step.name for step in STEPS), "small-check"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--method", help="of the check of correctness: this one, in this process")
    options = parser.parse_args(argv)
    if options.rehearse:
        # read by Triton when it is imported, which no step has done yet
        os.environ["TRITON_INTERPRET"] = "1"
    elif collect_environment().gpu is None:
        print("benchmarks.gpu_day.steps: no GPU here; --rehearse tries the script itself", file=sys.stderr)
        return 2
    records = Records(made_folder(parser, options.folder), options.step, rehearse=options.rehearse)
    if options.method is not None:
        from benchmarks.compiled.layers import MATRIX_METHODS

        if options.method not in MATRIX_METHODS:
            parser.error(f"--method {options.method}: expected one of {', '.join(MATRIX_METHODS)}")
    if options.method is not None:
        return check(records, small=False, only=options.method)
    return RUN[options.step](records)


if __name__ == "__main__":
    sys.exit(main())
