"""`python -m benchmarks.kernels.tune`: block sizes by measurement, into resmoe_vllm/kernels/configs/*.json.

One setting at a time, from the rule's sizes on, as long as it pays by more than 2 %.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.harness.shapes import SHAPES, MoEShape
from benchmarks.kernels.__main__ import TIMED_FIRST, TOKENS, cell_options, layer_calls, make_inputs, make_layers
from benchmarks.kernels.timing import graph_ms
from resmoe_vllm.kernels.gpu.block_sizes import CONFIGS, Config, config_file, default_config, write_configs

CHOICES = {"n": (16, 32, 64, 128), "k": (32, 64, 128, 256), "warps": (4, 8), "stages": (2, 3, 4, 5)}
GAIN = 0.98


def neighbours(config: Config) -> Iterator[Config]:
    """Every config that differs in one setting."""
    for programs in (132, 264, 528, 1056):
        yield replace(config, programs=programs)
    for block_m in (16, 32, 64, 128, 256):
        yield replace(config, block_m=block_m)
    yield replace(config, restore=not config.restore)
    for launch in ("hidden", "first", "last", "shrink"):
        blocks = getattr(config, launch)
        for setting, values in CHOICES.items():
            # a bitmap's columns begin at whole words
            for value in values[1:] if setting == "n" else values:
                yield replace(config, **{launch: replace(blocks, **{setting: value})})


def tune(shape: MoEShape, method: str, tokens: int, layers: list, deadline: float) -> Config:
    """The fastest found until the deadline."""
    from triton.runtime.errors import OutOfResources

    inputs, refresh = make_inputs(shape, tokens)
    best = default_config(tokens, shape.top_k, shape.experts, frozenset({method}))
    best_ms = graph_ms(layer_calls(shape, method, layers, inputs, best), refresh, 5).median().item()
    print(f"{shape.name}, {method}, T={tokens}: by rule {best_ms:.4f} ms", flush=True)
    seen = {best}
    improved = True
    while improved and time.monotonic() < deadline:
        improved = False
        for config in neighbours(best):
            if config in seen or time.monotonic() > deadline:
                continue
            seen.add(config)
            try:
                ms = graph_ms(layer_calls(shape, method, layers, inputs, config), refresh, 5).median().item()
            except OutOfResources:
                continue
            if ms < GAIN * best_ms:
                best, best_ms, improved = config, ms, True
                print(f"  {ms:.4f} ms {config}", flush=True)
    return best


def main() -> int:
    """Tune the named cells."""
    parser = cell_options("python -m benchmarks.kernels.tune", __doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="for each shape, method and token count")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.kernels.tune: no GPU here, nothing to tune on", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name()
    for name in options.shape or SHAPES:
        shape = SHAPES[name]
        for method in options.method or TIMED_FIRST:
            layers = make_layers(shape, method)
            configs = {
                tokens: tune(shape, method, tokens, layers, time.monotonic() + options.seconds)
                for tokens in options.tokens or TOKENS
            }
            file = config_file(
                shape.experts, shape.hidden, shape.intermediate, device, torch.bfloat16, frozenset({method})
            )
            write_configs(CONFIGS / file, configs)
            print(f"wrote {CONFIGS / file}", flush=True)
            del layers
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
