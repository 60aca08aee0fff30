"""`python -m benchmarks.kernels`: one MoE layer on a GPU, the Triton kernels against dense, bf16.

First every method against restored weights, with both strategies; one that is wrong is not timed. Then medians over
CUDA graph replays: each call in a graph has its own weights, together more than the L2, and routing is fresh in
every run. Dense is vLLM's fused MoE if vLLM can be imported, else these kernels on plain experts with the same
blocks; each row says which. Beside it stands vLLM's 4-bit weight-only layer (Marlin), where it is there.
`--cpu-check` runs the first part alone, in Triton's interpreter.

Exit codes: 0 ok, 1 a kernel is wrong, 2 there is no GPU.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.harness.environment import collect_environment
from benchmarks.harness.routing import route
from benchmarks.harness.shapes import SHAPES, MoEShape

if TYPE_CHECKING:
    from resmoe_vllm.kernels.gpu.block_sizes import Config

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
TIMED = ("low_rank", "bitmap", "quantized")
TIMED_FIRST = ("low_rank", "bitmap")
# largest error allowed, as a share of the largest output
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2}
# speed as a multiple of dense: up to 64 tokens by K, at 4096 tokens
TARGETS_FEW = {("low_rank", 8): 1.6, ("bitmap", 8): 1.4, ("low_rank", 2): 1.15, ("bitmap", 2): 1.05}
TARGETS_MANY = {"low_rank": 1.0, "bitmap": 0.85}
TARGET_BANDWIDTH = 0.65
CALLS, RUNS = 8, 15


def check(device: str, dtype: torch.dtype, methods: Sequence[str] | None = None) -> list[str]:
    """Names of wrong cases, of: every method, both strategies, few and many tokens, odd sizes, skipped pairs, a map."""
    from benchmarks.kernels.layers import LAYER_MAKERS, layer_ref, make_layer
    from resmoe_vllm.kernels.activation import SILU
    from resmoe_vllm.kernels.gpu.block_sizes import default_config
    from resmoe_vllm.kernels.gpu.launches import run_plan

    shape = MoEShape("check", hidden=200, intermediate=72, experts=5, top_k=2, layers=1)
    wrong = []
    for method, (tokens, sizes_for) in itertools.product(methods or LAYER_MAKERS, ((1, 1), (13, 13), (13, 256))):
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


def dense_baseline(shape: MoEShape, layers: list) -> tuple[str, Callable[[list], list]]:
    """(whose kernel, inputs -> calls) of the dense layer: vLLM's fused MoE, or ours on plain experts."""
    try:
        from vllm.model_executor.layers.fused_moe import fused_experts
    except ImportError:
        return "own Triton dense", lambda inputs: layer_calls(shape, "dense", layers, inputs)
    packed = []
    for layer in layers:
        gate, up, down = (layer.tiles[name][0].own for name in ("gate", "up", "down"))
        packed.append((torch.cat([gate, up], 1), down.mT.contiguous()))
        layer.tiles.clear()
    return "vLLM fused_experts", lambda inputs: [
        partial(fused_experts, x, *weights, topk_weights, topk_ids)
        for (x, topk_weights, topk_ids), weights in zip(inputs, itertools.cycle(packed), strict=False)
    ]


def layer_calls(
    shape: MoEShape, method: str, layers: list, inputs: list, config: "Config | None" = None
) -> list[Callable[[], object]]:
    """One call for each input, layers in turn; tuned block sizes where there are any, if none are given."""
    from resmoe_vllm.kernels.activation import SILU
    from resmoe_vllm.kernels.gpu.block_sizes import pick_config
    from resmoe_vllm.kernels.gpu.launches import run_plan

    if config is None:
        sizes = shape.experts, shape.hidden, shape.intermediate
        device = torch.cuda.get_device_name()
        config = pick_config(len(inputs[0][0]), shape.top_k, *sizes, device, torch.bfloat16, frozenset({method}))
    plans = [layer.plan(center_in_tile=config.center_in_tile) for layer in layers]
    return [
        partial(run_plan, *own, plan, SILU, None, config)
        for own, plan in zip(inputs, itertools.cycle(plans), strict=False)
    ]


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


def make_layers(shape: MoEShape, method: str) -> list:
    """As many as make what a graph reads larger than four times the L2, two at the least where memory allows."""
    from benchmarks.kernels.layers import make_layer

    first = make_layer(shape, method, "cuda", torch.bfloat16, seed=0)
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    # a lone token reads the center and K experts
    count = -(-4 * l2 // (first.shared_bytes + shape.top_k * first.expert_bytes))
    return [first, *(make_layer(shape, method, "cuda", torch.bfloat16, seed=i) for i in range(1, min(CALLS, count)))]


def target(method: str, shape: MoEShape, tokens: int) -> float | None:
    """Wanted multiple of dense speed."""
    if tokens <= 64:
        return TARGETS_FEW.get((method, shape.top_k))
    return TARGETS_MANY.get(method) if tokens == 4096 else None


def measure(
    shape: MoEShape, methods: Sequence[str], tokens: Sequence[int], deadline: float, bandwidth: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, names of the cells that the time did not suffice for) of one shape."""
    from benchmarks.kernels.timing import graph_ms

    rows: list[dict[str, Any]] = []
    unmeasured: list[str] = []
    dense: dict[int, tuple[str, torch.Tensor]] = {}
    marlin = measure_marlin(shape, tokens, deadline)
    for method in ("dense", *methods):
        layers = make_layers(shape, method)
        if method == "dense":
            baseline, calls_of = dense_baseline(shape, layers)
        for count in tokens:
            if time.monotonic() > deadline:
                unmeasured.append(f"{shape.name} {method} T={count}")
                continue
            inputs, refresh = make_inputs(shape, count)
            if method == "dense":
                dense[count] = baseline, graph_ms(calls_of(inputs), refresh, RUNS)
                continue
            if count not in dense:
                unmeasured.append(f"{shape.name} {method} T={count}")
                continue
            torch.cuda.reset_peak_memory_stats()
            ms = graph_ms(layer_calls(shape, method, layers, inputs), refresh, RUNS)
            # those of the last run; fresh ones hit as many on average
            hit = sum(ids.unique().numel() for _, _, ids in inputs) / len(inputs)
            read = layers[0].shared_bytes + hit * layers[0].expert_bytes
            rows += _rows(shape, method, count, dense[count], ms, read, bandwidth, marlin.get(count))
            print(rows[-2]["name"], f"{rows[-2]['value']:.2f}x", flush=True)
        del layers
        torch.cuda.empty_cache()
    return rows, unmeasured


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
    baseline: tuple[str, torch.Tensor],
    ms: torch.Tensor,
    read: float,
    bandwidth: float,
    marlin: tuple[torch.Tensor, float] | None,
) -> list[dict[str, Any]]:
    baseline_name, dense = baseline
    achieved = read / ms.median().item() / 1e6
    context = {
        "shape": shape.name,
        "method": method,
        "tokens": tokens,
        "baseline": baseline_name,
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
    return [
        _row(f"{name}: speed against dense", speed, "x", target(method, shape, tokens), context),
        _row(f"{name}: share of copy bandwidth", achieved / bandwidth, "", share_target, context),
    ]


def _row(name: str, value: float, unit: str, wanted: float | None, context: dict[str, Any]) -> dict[str, Any]:
    met = None if wanted is None else value >= wanted
    return {"name": name, "value": value, "unit": unit, "target": wanted, "met": met, **context}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Speed and share of bandwidth of each cell, and where a target is missed."""
    print(
        f"\n{'shape':16} {'method':10} {'T':>5} {'dense ms':>9} {'4-bit ms':>9} {'ms':>8} {'speed':>7} {'target':>7} "
        f"{'bandwidth':>9}"
    )
    for speed, share in zip(rows[::2], rows[1::2], strict=True):
        wanted = "" if speed["target"] is None else f"{speed['target']:.2f}x"
        missed = "" if speed["met"] is not False else " missed"
        marlin = "-" if speed["marlin_ms"] is None else f"{speed['marlin_ms']:.4f}"
        print(
            f"{speed['shape']:16} {speed['method']:10} {speed['tokens']:5} {speed['dense_ms']:9.4f} {marlin:>9} "
            f"{speed['resmoe_ms']:8.4f} {speed['value']:6.2f}x {wanted:>7} {share['value']:9.0%}{missed}"
        )


def cell_options(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser of the options that choose shapes, methods and token counts."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="default: all")
    parser.add_argument("--method", action="append", choices=TIMED, help=f"default: {' and '.join(TIMED_FIRST)}")
    parser.add_argument("--tokens", action="append", type=int, help=f"default: {' '.join(map(str, TOKENS))}")
    return parser


def main() -> int:
    """See the module's docstring."""
    parser = cell_options("python -m benchmarks.kernels", __doc__.split("\n\n")[0])
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
    if wrong := check("cuda", torch.bfloat16):
        print(f"benchmarks.kernels: wrong, so nothing is timed: {'; '.join(wrong)}", file=sys.stderr)
        return 1
    from benchmarks.kernels.timing import copy_gb_s

    bandwidth = copy_gb_s()
    rows, unmeasured = [], []
    for name in options.shape or SHAPES:
        made, missing = measure(
            SHAPES[name], options.method or TIMED_FIRST, options.tokens or TOKENS, deadline, bandwidth
        )
        rows, unmeasured = rows + made, unmeasured + missing
        if options.json is not None:
            environment = asdict(collect_environment())
            options.json.write_text(json.dumps({"rows": [{**row, **environment} for row in rows]}, indent=2) + "\n")
    if unmeasured:
        print(f"not measured, out of time: {'; '.join(unmeasured)}")
    where = collect_environment()
    print(f"{where.gpu}, copy {bandwidth:.0f} GB/s; torch {where.torch}, triton {where.triton}, vLLM {where.vllm}")
    print_table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
