"""`python -m benchmarks.kernels.tune`: block sizes by measurement, into resmoe_vllm/kernels/gpu/configs/*.json.

From the rule's sizes on, one launch after the other takes the fastest of its candidates, the whole layer timed in a
CUDA graph. All candidates are compiled before, in as many processes as there are cores, none of which needs the GPU.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.shapes import MoEShape
from benchmarks.kernels.warm import side_by_side
from resmoe_vllm.kernels.gpu.block_sizes import (
    CONFIGS,
    FEW_TOKENS,
    Blocks,
    Config,
    TokenClass,
    config_file,
    default_config,
    write_configs,
)

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
METHODS = ("low-rank",)
GAIN = 0.99
RUNS = 5
CALLS = 8
# Weights of a graph's calls, at the least: several times the L2.
_FRESH_BYTES = 250e6
# n, k, warps, stages of plain values up to FEW_TOKENS, beyond, and of what is decoded.
FEW_PLAIN = {
    "first": [(32, 128, 4, 4), (32, 128, 4, 6), (16, 256, 4, 5), (32, 256, 4, 4), (64, 64, 4, 6), (64, 128, 4, 4)],
    "hidden": [(32, 64, 4, 4), (32, 128, 4, 3), (32, 256, 4, 2), (64, 64, 4, 4), (64, 128, 4, 3), (16, 256, 4, 2)],
    "shrink": [(32, 128, 4, 4), (32, 128, 4, 6), (16, 256, 4, 5), (32, 256, 4, 4), (64, 128, 4, 4), (64, 64, 4, 6)],
    "last": [(32, 128, 4, 4), (64, 128, 4, 4), (64, 64, 4, 5), (128, 64, 4, 4), (128, 128, 8, 3), (32, 256, 4, 3)],
}
_WIDE = [
    (128, 64, 8, 3), (128, 64, 4, 3), (128, 64, 8, 4), (128, 64, 4, 4), (256, 64, 8, 3), (64, 64, 4, 4), (64, 128, 4, 3)
]  # fmt: skip
MANY_PLAIN = {
    "first": _WIDE,
    "hidden": [
        (64, 64, 8, 3), (64, 64, 8, 2), (64, 32, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2),
        (128, 32, 8, 3), (128, 64, 4, 3), (64, 128, 4, 2), (64, 128, 8, 2), (128, 128, 16, 2), (128, 128, 8, 2)
    ],
    "shrink": [(64, 64, 8, 3), (64, 64, 4, 4), *_WIDE[:6]],
    "last": _WIDE,
}  # fmt: skip
DECODED = {
    "hidden": [(32, 64, 4, 3), (32, 32, 4, 3), (32, 128, 4, 3), (64, 64, 4, 3), (64, 64, 8, 3), (128, 64, 8, 3)],
    "last": [(64, 64, 4, 3), (64, 32, 4, 3), (64, 128, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2)],
}


def steps(tokens: int, coders: frozenset[str]) -> Iterator[tuple[str, list[Any]]]:
    """(setting of a ``Config``, its candidates), in the order in which they are tried."""
    plain = not coders - {"low_rank", "dense"}
    if tokens > FEW_TOKENS:
        yield "block_m", [32, 64, 128]
    candidates = FEW_PLAIN if tokens <= FEW_TOKENS else MANY_PLAIN
    if not plain:
        candidates = candidates | DECODED
    for name in ("hidden", "first", "last", "shrink"):
        if name != "shrink" or "low_rank" in coders:
            yield name, [Blocks(*sizes) for sizes in candidates[name]]
    if tokens <= FEW_TOKENS:
        yield "programs", [264, 528, 1056]


def base_config(shape: MoEShape, tokens: int, coders: frozenset[str]) -> Config:
    """Where the search begins."""
    return default_config(tokens, shape.top_k, shape.experts, coders)


@dataclass
class Tuned:
    """A layer bound to its kernels, and the launches of the sizes that it had last."""

    kernel: Any
    config: object = None
    launches: Any = None


def run_config(layer: Tuned, tokens: int, config: Config, given: tuple[Tensor, Tensor, Tensor]) -> None:
    """One call of a layer with these sizes."""
    from resmoe_vllm.kernels.activation import SILU
    from resmoe_vllm.kernels.gpu.launches import LayerLaunches

    if layer.config != (tokens, config):
        layer.config = tokens, config
        layer.launches = LayerLaunches(layer.kernel.plans[config.center_in_tile], SILU, TokenClass(tokens, config))
    layer.launches(*given)


def compile_part(shape: MoEShape, method: str, tokens: tuple[int, ...], card: str, part: int, parts: int) -> None:
    """Compile every ``parts``-th candidate into Triton's cache, with weights that nobody wrote."""
    from benchmarks.compiled.cards import CARDS
    from benchmarks.compiled.layers import matrix_groups
    from benchmarks.compiled.recorder import recorded
    from resmoe_vllm.kernels.activation import SILU
    from resmoe_vllm.kernels.gpu import align
    from resmoe_vllm.kernels.gpu.layer import GpuKernel

    # vLLM's own sorting of many pairs is no kernel of ours, and does not run on the CPU.
    align.MAX_PAIRS = sys.maxsize
    layer = Tuned(GpuKernel(matrix_groups(shape, method, "bfloat16"), SILU))
    coders = layer.kernel.coders
    jobs = []
    for count in tokens:
        base = base_config(shape, count, coders)
        found = list(steps(count, coders))
        ms = next((values for name, values in found if name == "block_m"), [base.block_m])
        for block_m in ms:
            jobs += [
                (count, replace(base, block_m=block_m, **{name: value}))
                for name, values in found
                if name != "block_m"
                for value in values
            ]
    for count, config in jobs[part::parts]:
        x = torch.empty(count, shape.hidden, dtype=torch.bfloat16)
        ids = torch.empty(count, shape.top_k, dtype=torch.int32)
        with recorded(CARDS[card], compile_kernels=True) as launches:
            run_config(layer, count, config, (x, torch.empty(count, shape.top_k), ids))
        for launch in launches:
            if launch.error:
                print(f"T={count} {config}: {launch.error}", file=sys.stderr)


def compile_all(options: argparse.Namespace, shape: str, method: str) -> None:
    """``compile_part`` in one process for each core."""
    parts = os.cpu_count() or 1
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernels.tune", "--shape", shape, "--method", method]
    command += ["--tokens", *map(str, options.tokens), "--card", options.card]
    side_by_side([*command, "--part", str(part), str(parts)] for part in range(parts))


def make_layers(shape: MoEShape, method: str) -> list[Tuned]:
    """Layers with random weights on the GPU, as the plugin loads them; so many that the L2 keeps little of them."""
    from benchmarks.compiled.layers import MATRIX_METHODS
    from benchmarks.models.synthetic_layer import gpu_layer, synthetic_format
    from resmoe_vllm.kernels.activation import SILU
    from resmoe_vllm.kernels.gpu.layer import GpuKernel

    fmt = synthetic_format(shape, "bfloat16", **MATRIX_METHODS[method])
    layers: list[Tuned] = []
    count = 2
    while len(layers) < min(CALLS, count):
        groups, module = gpu_layer(fmt)
        read = sum(parameter.nbytes for parameter in module.parameters()) * shape.top_k / shape.experts
        count = int(_FRESH_BYTES / read) + 1
        layers.append(Tuned(GpuKernel(groups, SILU)))
    return layers


def tune(shape: MoEShape, tokens: int, layers: list[Tuned], deadline: float) -> tuple[Config, float, float]:
    """(the fastest config, its milliseconds, the rule's)."""
    from functools import partial

    from benchmarks.kernels.__main__ import make_inputs
    from benchmarks.kernels.timing import graph_ms

    inputs, refresh = make_inputs(shape, tokens)
    coders = layers[0].kernel.coders

    def time_of(config: Config) -> float:
        calls = [
            partial(run_config, layers[number % len(layers)], tokens, config, given)
            for number, given in enumerate(inputs)
        ]
        return float(graph_ms(calls, refresh, RUNS).median())

    best = base_config(shape, tokens, coders)
    best_ms = first_ms = time_of(best)
    for name, values in steps(tokens, coders):
        tried = []
        for value in values:
            config = replace(best, **{name: value})
            if time.monotonic() > deadline:
                break
            try:
                tried.append((time_of(config), config))
            except Exception as error:
                # What does not fit this card is no candidate, whatever the compiler or the driver calls it.
                print(f"  T={tokens} {name} {value}: {type(error).__name__}: {str(error)[:100]}", flush=True)
        text = ", ".join(f"{_text(getattr(config, name))} {1e3 * ms:.1f}" for ms, config in tried)
        print(f"  T={tokens} {name}: {text}", flush=True)
        ms, config = min(tried, key=lambda pair: pair[0], default=(best_ms, best))
        if ms < GAIN * best_ms:
            best, best_ms = config, ms
    return best, best_ms, first_ms


def _text(value: object) -> str:
    return "/".join(map(str, asdict(value).values())) if isinstance(value, Blocks) else str(value)


def main() -> int:
    """Tune the named cells."""
    from benchmarks.compiled.layers import MATRIX_METHODS, MATRIX_SHAPES

    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", nargs="+", default=["OLMoE-1B-7B"], choices=list(MATRIX_SHAPES), metavar="NAME")
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=list(MATRIX_METHODS), metavar="NAME")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), metavar="T")
    parser.add_argument("--seconds", type=float, default=90, help="for each shape and method, compiling apart")
    parser.add_argument("--card", default="sm_90", help="that is compiled for")
    parser.add_argument("--out", type=Path, default=CONFIGS, metavar="FOLDER", help="of the files")
    parser.add_argument("--part", nargs=2, type=int, metavar=("I", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        compile_part(
            MATRIX_SHAPES[options.shape[0]], options.method[0], tuple(options.tokens), options.card, *options.part
        )
        return 0
    if not torch.cuda.is_available():
        print("benchmarks.kernels.tune: no GPU here, nothing to tune on", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name()
    for name in options.shape:
        shape = MATRIX_SHAPES[name]
        for method in options.method:
            began = time.monotonic()
            compile_all(options, name, method)
            print(f"{name} {method}: compiled in {time.monotonic() - began:.0f} s", flush=True)
            layers = make_layers(shape, method)
            coders = layers[0].kernel.coders
            deadline = time.monotonic() + options.seconds
            configs = {}
            for tokens in options.tokens:
                configs[tokens], ms, before = tune(shape, tokens, layers, deadline)
                print(f"{name} {method} T={tokens}: {1e3 * before:.1f} us by rule, {1e3 * ms:.1f} us", flush=True)
                print(f"  {json.dumps(asdict(configs[tokens]))}", flush=True)
            file = config_file(shape.experts, shape.hidden, shape.intermediate, device, torch.bfloat16, coders)
            write_configs(options.out / file, configs)
            print(f"wrote {options.out / file}", flush=True)
            del layers
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
