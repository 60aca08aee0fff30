"""`python -m benchmarks.moe_cpu`: one MoE layer on the CPU, ResMoE against vLLM's own dense fused MoE.

Same process, same threads, same routing. Several layers' weights, more than the cache, are used in turn; routing is
fresh in every run. Dense is vLLM's grouped GEMM with its prepacked weights. Medians over runs, dense and ResMoE
taken alternately so that a change of the machine's speed meets both.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks.harness.routing import route
from benchmarks.harness.rows import Row, print_rows, write_rows
from benchmarks.harness.shapes import SHAPES, MoEShape
from benchmarks.models.synthetic_layer import CODINGS, synthetic_format, synthetic_layer
from compress_tools.format.tensors import layer_bytes, row_pointer_bytes
from resmoe_vllm.kernels.cpu.build import chosen_path

DEFAULT_TOKENS = (1, 4, 16, 64, 256, 1024)
MIN_RUNS, MIN_SECONDS = 7, 1.0
# The project's targets at T = 1, as a multiple of dense speed; low rank is also never to fall below 0.9 at any T.
TARGET_T1 = {"low-rank": 1.8, "low-rank-8bit": 1.8, "prune": 1.6}
TARGET_T1_TOP2 = 1.15
TARGET_FLOOR = 0.9

Forward = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def dense_forward(shape: MoEShape, layers: int, seed: int) -> Forward:
    """The dense CPU fused MoE of vLLM over random bf16 weights."""
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    weights = []
    for index in range(layers):
        generator = torch.Generator().manual_seed(seed + index)
        pair = []
        for rows, columns in ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)):
            line = (columns**-0.5 * torch.randn(rows, columns, generator=generator)).bfloat16()
            pair.append(cpu_prepack_moe_weight(line.expand(shape.experts, rows, columns).contiguous(), isa))
        weights.append(pair)

    def forward(index: int, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        out = torch.empty_like(x)
        w13, w2 = weights[index]
        cpu_fused_moe(out, x, w13, w2, None, None, topk_weights, topk_ids, "silu", isa, skip_weighted=False)
        return out

    return forward


def resmoe_forward(shape: MoEShape, method: str, layers: int, seed: int) -> tuple[Forward, int]:
    """The plugin's kernel over random layers, and one layer's resident bytes."""
    from resmoe_vllm.kernels.activation import SILU
    from resmoe_vllm.kernels.cpu.dispatch import CpuKernel

    fmt = synthetic_format(shape, layers=layers, **CODINGS[method])
    made = (synthetic_layer(fmt, index, seed + index) for index in range(layers))
    kernels = [CpuKernel(layout.bind(tensors), SILU) for layout, tensors in made]

    def forward(index: int, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return kernels[index](x, topk_weights, topk_ids)

    return forward, layer_bytes(fmt, 0) + row_pointer_bytes(fmt, 0)


def time_alternately(forwards: list[Forward], shape: MoEShape, tokens: int, layers: int) -> list[list[float]]:
    """Milliseconds of each run, for each forward; every forward sees the same inputs."""
    generator = torch.Generator().manual_seed(tokens)
    times: list[list[float]] = [[] for _ in forwards]
    begin, run = time.perf_counter(), 0
    while run < MIN_RUNS + 2 or time.perf_counter() - begin < MIN_SECONDS * len(forwards):
        x = torch.randn(tokens, shape.hidden, generator=generator).bfloat16()
        inputs = x, *route(shape, tokens, generator)
        for forward, kept in zip(forwards, times, strict=True):
            start = time.perf_counter()
            forward(run % layers, *inputs)
            if run >= 2:  # warm-up
                kept.append(1e3 * (time.perf_counter() - start))
        run += 1
    return times


def read_bandwidth() -> float:
    """GB/s read by summing a large array, best of five: what memory can deliver to these threads."""
    source = torch.ones(256 * 2**20 // 4)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        source.sum()
        best = max(best, source.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def read_bytes(shape: MoEShape, method: str, tokens: int) -> float:
    """Bytes that must be read for T tokens routed uniformly: center once, each expert that is hit once."""
    all_experts, one = (
        layer_bytes(fmt, 0) + row_pointer_bytes(fmt, 0)
        for fmt in (synthetic_format(own, **CODINGS[method]) for own in (shape, replace(shape, experts=1)))
    )
    residual = (all_experts - one) / (shape.experts - 1)
    hit = 1 - (1 - shape.top_k / shape.experts) ** tokens
    return one - residual + hit * shape.experts * residual


@click.command()
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), help="Default: all.")
@click.option("--method", "methods", multiple=True, type=click.Choice(list(CODINGS)), help="Default: all.")
@click.option("--tokens", multiple=True, type=int, help="Default: 1 4 16 64 256 1024.")
@click.option("--layers", default=2, show_default=True, type=click.IntRange(min=1), help="Layers used in turn.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows to FILE.")
def main(
    shapes: tuple[str, ...], methods: tuple[str, ...], tokens: tuple[int, ...], layers: int, json_file: Path | None
) -> None:
    """Time one MoE layer, ResMoE against vLLM's dense kernel."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    bandwidth = read_bandwidth()
    rows = [Row("memory read bandwidth", bandwidth, "GB/s")]
    for name in shapes or SHAPES:
        shape = SHAPES[name]
        # Mixtral's dense layer is 2.8 GB: one is more than any cache.
        used = 1 if shape.top_k == 2 else layers
        forwards = [dense_forward(shape, used, seed=1)]
        for method in methods or CODINGS:
            resmoe, _ = resmoe_forward(shape, method, used, seed=2)
            for count in tokens or DEFAULT_TOKENS:
                dense_ms, resmoe_ms = time_alternately([*forwards, resmoe], shape, count, used)
                rows.append(_row(shape, method, count, dense_ms, resmoe_ms, bandwidth))
                print_rows(rows[-1:], "") if json_file is None else write_rows(rows, json_file)
            del resmoe
        del forwards
    print_rows(rows, "MoE layer on the CPU, speed as a multiple of vLLM's dense fused MoE")
    if json_file:
        write_rows(rows, json_file)


def _row(
    shape: MoEShape, method: str, tokens: int, dense_ms: list[float], resmoe_ms: list[float], bandwidth: float
) -> Row:
    dense, resmoe = (torch.tensor(times) for times in (dense_ms, resmoe_ms))
    speed = (dense.median() / resmoe.median()).item()
    achieved = read_bytes(shape, method, tokens) / resmoe.median().item() / 1e6
    context = {
        "shape": shape.name,
        "method": method,
        "tokens": tokens,
        "dense_ms": dense.median().item(),
        "resmoe_ms": resmoe.median().item(),
        "dense_p20_p80_ms": dense.quantile(torch.tensor([0.2, 0.8])).tolist(),
        "resmoe_p20_p80_ms": resmoe.quantile(torch.tensor([0.2, 0.8])).tolist(),
        "read_gb_s": achieved,
        "share_of_bandwidth": achieved / bandwidth,
        "threads": torch.get_num_threads(),
        "path": chosen_path(),
    }
    name = (
        f"{shape.name}, {method}, T={tokens}: dense {dense.median():.2f} ms, "
        f"ResMoE {resmoe.median():.2f} ms, {achieved:.1f} GB/s"
    )
    target = None
    if tokens == 1 and method in TARGET_T1:
        target = TARGET_T1_TOP2 if shape.top_k == 2 else TARGET_T1[method]
    elif method.startswith("low-rank"):
        target = TARGET_FLOOR
    if target is None:
        return Row(name, speed, "x", context=context)
    return Row.at_least(name, speed, "x", target, **context)


if __name__ == "__main__":
    main()
