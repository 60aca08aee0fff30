"""`python -m benchmarks.kernels`: one MoE layer on a GPU, as the plugin loads it, against dense, bf16.

Kernels are compiled first, in one process a core. Then each way of coding is held against its plain-torch truth; one
that is wrong is not timed. Times are medians over CUDA graph replays: each call in a graph has its own weights,
together more than the L2, and routing is fresh in every run. Dense is vLLM's fused MoE; beside it stands vLLM's 4-bit
weight-only layer (Marlin), where it is there. `--cpu-check` runs small layers in Triton's interpreter alone.

Exit codes: 0 ok, 1 a kernel is wrong, 2 there is no GPU, or no vLLM.
"""

import argparse
import importlib.util
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.environment import collect_environment
from benchmarks.harness.routing import route
from benchmarks.harness.shapes import SHAPES, MoEShape

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
# `benchmarks.compiled.layers.MATRIX_METHODS` has more.
TIMED = ("low-rank", "low-rank-8bit", "prune", "quantize-4bit", "quantize-4bit-alone", "trellis-4bit")
ALONE = {"trellis-4bit-alone": {"method": "trellis", "bits": 4, "center": "none"}}
# largest error allowed, as a share of the largest output
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2}
# speed as a multiple of dense: up to 64 tokens by K, and from 64 tokens on
TARGETS_FEW = {("low-rank", 8): 1.6, ("prune", 8): 1.4, ("low-rank", 2): 1.15, ("prune", 2): 1.05}
TARGETS_MANY = {"low-rank": 1.3, "prune": 0.85}
# speed as a multiple of vLLM's 4-bit layer, at about equal bytes
TARGET_MARLIN = 0.9
MARLIN_TOKENS = (1, 16, 64)
TARGET_BANDWIDTH = 0.65
# of the check before a way of coding is timed: few and many
CHECKED_TOKENS = (13, 1024)
CALLS, RUNS = 8, 15


def check(device: str, dtype: torch.dtype, kinds: Sequence[str] | None = None) -> list[str]:
    """Names of wrong cases, of: every method, both strategies, few and many tokens, odd sizes, skipped pairs, a map."""
    from benchmarks.kernels.layers import LAYER_MAKERS, layer_ref, make_layer
    from resmoe_vllm.kernels.activation import SILU
    from resmoe_vllm.kernels.gpu.block_sizes import default_config
    from resmoe_vllm.kernels.gpu.launches import run_plan

    shape = MoEShape("check", hidden=200, intermediate=72, experts=5, top_k=2, layers=1)
    wrong = []
    for method, (tokens, sizes_for) in itertools.product(kinds or LAYER_MAKERS, ((1, 1), (13, 13), (13, 256))):
        layer = make_layer(shape, method, device, dtype, seed=1, keep_truth=True)
        generator = torch.Generator(device).manual_seed(tokens)
        x = torch.randn(tokens, shape.hidden, generator=generator, device=device).to(dtype)
        weights, ids = route(shape, tokens, generator)
        ids[-1, 0] = -1
        config = default_config(sizes_for, shape.top_k, shape.experts, frozenset({method}))
        for mapped in (False, True):
            # with a map the ids are other numbers for the same experts
            expert_map = torch.arange(9, -1, -1, device=device, dtype=torch.int32) if mapped else None
            if expert_map is not None:
                expert_map[:5] = -1
            given = torch.where(ids < 0, -1, 9 - ids).int() if mapped else ids
            found = run_plan(
                x, weights, given, layer.plan(center_in_tile=config.center_in_tile), SILU, expert_map, config
            ).float()
            expected = layer_ref(x, weights, ids, layer.truth)
            error = ((found - expected).abs().max() / expected.abs().max()).item()
            what = f"{method}, T={tokens}, blocks for {sizes_for}{', expert map' if mapped else ''}"
            ok = error <= TOLERANCE[dtype]
            print(f"{'ok   ' if ok else 'WRONG'} {what}: error {error:.1e}", flush=True)
            if not ok:
                wrong.append(what)
    return wrong


def methods() -> dict[str, dict[str, Any]]:
    """Ways of coding that can be timed, as options of `resmoe compress`."""
    from benchmarks.compiled.layers import MATRIX_METHODS

    return MATRIX_METHODS | ALONE


def dense_calls(shape: MoEShape) -> Callable[[list], list]:
    """Inputs -> calls of vLLM's fused MoE on random weights."""
    from vllm.model_executor.layers.fused_moe import fused_experts

    sizes = (shape.experts, 2 * shape.intermediate, shape.hidden), (shape.experts, shape.hidden, shape.intermediate)
    nbytes = 6 * shape.top_k * shape.hidden * shape.intermediate
    packed = [
        [torch.randn(size, device="cuda", dtype=torch.bfloat16).mul_(shape.hidden**-0.5) for size in sizes]
        for _ in range(copies(nbytes))
    ]
    return lambda inputs: [
        partial(fused_experts, x, *weights, topk_weights, topk_ids)
        for (x, topk_weights, topk_ids), weights in zip(inputs, itertools.cycle(packed), strict=False)
    ]


def copies(nbytes: float) -> int:
    """Of a layer of which a token reads so many bytes: together four times the L2, two at the least."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(CALLS, -(-4 * l2 // max(1, int(nbytes)))))


@dataclass
class TimedLayers:
    """Layers of one way of coding, of random content, as the plugin loads them.

    Attributes:
        layers: equal in all but their memory.
        weights: of the first one, for the reference.
        shared_bytes: read once, whatever the routing.
        expert_bytes: read for each expert that is hit.
    """

    layers: list
    weights: Any
    shared_bytes: int
    expert_bytes: float


def make_layers(shape: MoEShape, method: str) -> TimedLayers:
    """As many as a graph needs."""
    from benchmarks.models.synthetic_layer import gpu_layer, synthetic_format
    from resmoe_vllm.kernels.activation import SILU
    from resmoe_vllm.ops import BoundLayer

    fmt = synthetic_format(shape, "bfloat16", **methods()[method])
    made: list = []
    weights, shared, each, count = None, 0, 0.0, 1
    while len(made) < count:
        groups, module = gpu_layer(fmt)
        sizes = [(len(param) == shape.experts, param.nbytes) for param in module.parameters()]
        shared = sum(size for own, size in sizes if not own)
        each = sum(size for own, size in sizes if own) / shape.experts
        weights = weights or groups[0].weights
        made.append(BoundLayer(groups, SILU, "cuda"))
        count = copies(shared + shape.top_k * each)
    return TimedLayers(made, weights, shared, each)


def compile_kernels(cells: Sequence[tuple[str, str]], tokens: Sequence[int]) -> None:
    """Into Triton's cache, in one process a core."""
    from benchmarks.kernels.warm import side_by_side

    waiting = [(shape, method, str(count)) for shape, method in cells for count in tokens]
    parts = min(len(waiting), os.cpu_count() or 1)
    major, minor = torch.cuda.get_device_capability()
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernels.warm", f"sm_{10 * major + minor}"]
    side_by_side([*command, *(":".join(cell) for cell in waiting[part::parts])] for part in range(parts))


def error_of(shape: MoEShape, made: TimedLayers) -> float:
    """Largest difference from the plain-torch truth, as a share of the largest output; infinite where it is NaN."""
    from resmoe_vllm.kernels.activation import SILU
    from resmoe_vllm.kernels.reference import fused_moe_ref

    errors = []
    for tokens in CHECKED_TOKENS:
        (given, *_), _ = make_inputs(shape, tokens)
        expected = fused_moe_ref(*given, made.weights, SILU, None).float()
        found = made.layers[0](*given).float()
        errors.append(((found - expected).abs().max() / expected.abs().max()).item())
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def make_inputs(shape: MoEShape, tokens: int) -> tuple[list, Callable[[], None]]:
    """(x, topk_weights, topk_ids) for each call of a graph, and what gives them fresh routing in place."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    inputs = []
    for _ in range(CALLS):
        x = torch.randn(tokens, shape.hidden, generator=generator, device="cuda").bfloat16()
        inputs.append((x, *route(shape, tokens, generator)))

    def refresh() -> None:
        for _, weights, ids in inputs:
            for old, new in zip((weights, ids), route(shape, tokens, generator), strict=True):
                old.copy_(new)

    return inputs, refresh


def target(method: str, shape: MoEShape, tokens: int) -> float | None:
    """Wanted multiple of dense speed."""
    if tokens <= 64 and (method, shape.top_k) in TARGETS_FEW:
        return TARGETS_FEW[method, shape.top_k]
    return TARGETS_MANY.get(method) if tokens >= 64 else None


def measure(
    shape: MoEShape, names: Sequence[str], tokens: Sequence[int], deadline: float, bandwidth: float
) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """(rows, names of the cells that the time did not suffice for, wrong methods) of one shape."""
    from benchmarks.kernels.timing import graph_ms

    rows: list[dict[str, Any]] = []
    unmeasured: list[str] = []
    wrong: list[str] = []
    dense: dict[int, torch.Tensor] = {}
    marlin = measure_marlin(shape, tokens, deadline)
    for method in ("dense", *names):
        made = None
        if method == "dense":
            calls_of = dense_calls(shape)
        else:
            made = make_layers(shape, method)
            error = error_of(shape, made)
            print(f"{shape.name} {method}: error {error:.1e}", flush=True)
            if error > TOLERANCE[torch.bfloat16]:
                wrong.append(f"{shape.name} {method}")
                continue
        for count in tokens:
            if time.monotonic() > deadline:
                unmeasured.append(f"{shape.name} {method} T={count}")
                continue
            inputs, refresh = make_inputs(shape, count)
            if made is None:
                dense[count] = graph_ms(calls_of(inputs), refresh, RUNS)
                continue
            if count not in dense:
                unmeasured.append(f"{shape.name} {method} T={count}")
                continue
            torch.cuda.reset_peak_memory_stats()
            calls = [partial(layer, *own) for own, layer in zip(inputs, itertools.cycle(made.layers), strict=False)]
            ms = graph_ms(calls, refresh, RUNS)
            # those of the last run; fresh ones hit as many on average
            hit = sum(ids.unique().numel() for _, _, ids in inputs) / len(inputs)
            read = made.shared_bytes + hit * made.expert_bytes
            rows += _rows(shape, method, count, dense[count], ms, read, bandwidth, marlin.get(count))
            print(f"{shape.name} {method} T={count}: {1e3 * ms.median().item():.1f} us", flush=True)
        made = None
        torch.cuda.empty_cache()
    return rows, unmeasured, wrong


def measure_marlin(shape: MoEShape, tokens: Sequence[int], deadline: float) -> dict[int, tuple[torch.Tensor, float]]:
    """(milliseconds, bytes read) of vLLM's 4-bit layer by token count; empty where vLLM does not have it."""
    from benchmarks.kernels.marlin import marlin_bytes, marlin_call, marlin_weights
    from benchmarks.kernels.timing import graph_ms

    first = marlin_weights(shape, "cuda", 0)
    if marlin_call(first) is None:
        return {}
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(CALLS, -(-4 * l2 // int(marlin_bytes(first, shape.top_k))))
    layers = [marlin_call(weights) for weights in (first, *(marlin_weights(shape, "cuda", i) for i in range(1, count)))]
    found = {}
    for number in tokens:
        if time.monotonic() > deadline:
            break
        inputs, refresh = make_inputs(shape, number)
        calls = [partial(layer, *own) for own, layer in zip(inputs, itertools.cycle(layers), strict=False)]
        ms = graph_ms(calls, refresh, RUNS)
        hit = sum(ids.unique().numel() for _, _, ids in inputs) / len(inputs)
        found[number] = ms, marlin_bytes(first, hit)
    return found


def _rows(  # noqa: PLR0913 -- a row's figures
    shape: MoEShape,
    method: str,
    tokens: int,
    dense: torch.Tensor,
    ms: torch.Tensor,
    read: float,
    bandwidth: float,
    marlin: tuple[torch.Tensor, float] | None,
) -> list[dict[str, Any]]:
    achieved = read / ms.median().item() / 1e6
    context = {
        "shape": shape.name,
        "method": method,
        "tokens": tokens,
        "baseline": "vLLM fused_experts",
        "dense_ms": dense.median().item(),
        "resmoe_ms": ms.median().item(),
        "dense_p20_p80_ms": dense.quantile(torch.tensor([0.2, 0.8])).tolist(),
        "resmoe_p20_p80_ms": ms.quantile(torch.tensor([0.2, 0.8])).tolist(),
        "read_bytes": read,
        "marlin_ms": None if marlin is None else marlin[0].median().item(),
        "marlin_bytes": None if marlin is None else marlin[1],
        "copy_gb_s": bandwidth,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
    }
    name = f"{shape.name}, {method}, T={tokens}"
    speed = (dense.median() / ms.median()).item()
    share_target = TARGET_BANDWIDTH if tokens == 16 and method in TARGETS_MANY else None
    made = [
        _row(f"{name}: speed against dense", speed, "x", target(method, shape, tokens), context),
        _row(f"{name}: share of copy bandwidth", achieved / bandwidth, "", share_target, context),
    ]
    if marlin is not None:
        ratio = (marlin[0].median() / ms.median()).item()
        wanted = TARGET_MARLIN if method.endswith("-alone") and tokens in MARLIN_TOKENS else None
        made.append(_row(f"{name}: speed against vLLM's 4-bit layer", ratio, "x", wanted, context))
    return made


def _row(name: str, value: float, unit: str, wanted: float | None, context: dict[str, Any]) -> dict[str, Any]:
    met = None if wanted is None else value >= wanted
    return {"name": name, "value": value, "unit": unit, "target": wanted, "met": met, **context}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Times of each cell beside dense and 4 bits, its share of bandwidth, and where a target is missed."""
    titles = f"{'dense us':>9} {'4-bit us':>9} {'us':>8} {'dense':>7} {'4-bit':>7} {'read':>6}"
    print(f"\n{'shape':16} {'method':20} {'T':>5} {titles}")
    cells: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["shape"], row["method"], row["tokens"]), []).append(row)
    for (shape, method, tokens), own in cells.items():
        speed, share = own[:2]
        marlin = "-" if len(own) < 3 else f"{1e3 * speed['marlin_ms']:.1f}"
        ratio = "-" if len(own) < 3 else f"{own[2]['value']:.2f}x"
        missed = "".join(f"  missed {row['target']}" for row in own if row["met"] is False)
        print(
            f"{shape:16} {method:20} {tokens:5} {1e3 * speed['dense_ms']:9.1f} {marlin:>9} "
            f"{1e3 * speed['resmoe_ms']:8.1f} {speed['value']:6.2f}x {ratio:>7} {share['value']:6.0%}{missed}"
        )


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), metavar="NAME", help=", ".join(SHAPES))
    parser.add_argument("--method", nargs="+", metavar="NAME", help=f"default: {' '.join(TIMED)}")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="T", help=f"default: {' '.join(map(str, TOKENS))}")
    parser.add_argument("--minutes", type=float, default=7.5, help="stop after this long, and say what is missing")
    parser.add_argument("--json", type=Path, help="write the rows to FILE")
    parser.add_argument("--cpu-check", action="store_true", help="correctness alone, in Triton's interpreter")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    if options.cpu_check:
        os.environ["TRITON_INTERPRET"] = "1"
        return 1 if check("cpu", torch.float32) else 0
    if not torch.cuda.is_available():
        print("benchmarks.kernels: no GPU here, nothing is measured; --cpu-check checks results", file=sys.stderr)
        return 2
    if importlib.util.find_spec("vllm") is None:
        print(
            "benchmarks.kernels: vLLM is not installed, and its dense layer is what all is held against",
            file=sys.stderr,
        )
        return 2
    names, shapes, tokens = options.method or TIMED, options.shape or list(SHAPES), options.tokens or TOKENS
    if unknown := sorted(set(names) - set(methods())):
        parser.error(f"no method is named {', '.join(unknown)}; choose from {', '.join(methods())}")
    from benchmarks.kernels.timing import copy_gb_s

    compile_kernels([(shape, method) for shape in shapes for method in names], sorted({*tokens, *CHECKED_TOKENS}))
    bandwidth = copy_gb_s()
    rows, unmeasured, wrong = [], [], []
    for name in shapes:
        made, missing, failed = measure(SHAPES[name], names, tokens, deadline, bandwidth)
        rows, unmeasured, wrong = rows + made, unmeasured + missing, wrong + failed
        if options.json is not None:
            environment = asdict(collect_environment())
            options.json.write_text(json.dumps({"rows": [{**row, **environment} for row in rows]}, indent=2) + "\n")
    if unmeasured:
        print(f"not measured, out of time: {'; '.join(unmeasured)}")
    where = collect_environment()
    print(f"{where.gpu}, copy {bandwidth:.0f} GB/s; torch {where.torch}, triton {where.triton}, vLLM {where.vllm}")
    print_table(rows)
    if wrong:
        print(f"benchmarks.kernels: wrong, so not timed: {'; '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
