"""`python -m benchmarks.cpu_weights`: ns the CPU kernel takes for a weight of each coder, in cache and from memory.

One token is multiplied by one expert without a center. The time of a layer of few rows is taken off, so that what a
call costs does not count, and the rest is divided by the weights between. In cache the same expert is read again and
again; from memory each call reads another one of more than the caches hold. Beside these: what Python and torch take
around the kernel, warm and after memory of a layer's size was read.
"""

import ctypes
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.harness.quiet import QuietMachine
from benchmarks.harness.rows import Row, print_rows, write_rows
from benchmarks.harness.shapes import MoEShape
from benchmarks.models.synthetic_layer import synthetic_format, synthetic_layer
from compress_tools.errors import KernelUnsupportedError
from resmoe_vllm.kernels.activation import SILU
from resmoe_vllm.kernels.cpu import native
from resmoe_vllm.kernels.cpu.build import chosen_path

HIDDEN, FEW_ROWS = 1024, 32
CODERS: dict[str, dict[str, Any]] = {
    **{f"codes {bits} bits by 128": {"method": "quantize", "bits": bits} for bits in (2, 3, 4, 8)},
    "codes 4 bits by row": {"method": "quantize", "bits": 4, "group_size": 0},
    **{f"trellis {bits} bits": {"method": "trellis", "bits": bits} for bits in (1, 2, 3, 4)},
    "bitmap 25 %": {"method": "prune", "retain_ratio": 0.25},
    "bitmap 25 %, values of 8 bits": {"method": "prune", "retain_ratio": 0.25, "value_bits": 8},
    "low rank 25 %": {"method": "low-rank", "retain_ratio": 0.25},
    "low rank 25 %, 8 bits": {"method": "low-rank", "retain_ratio": 0.25, "factor_bits": 8},
}
# A layer that is read between two calls of the op: more than the second cache, as OLMoE's in 4 bits.
BETWEEN_BYTES = 2**24
OVERHEAD_US = 30


def kernel(options: dict[str, Any], rows: int, experts: int) -> native.NativeKernel:
    """Random experts of so many rows, without a center, bound."""
    shape = MoEShape("one", HIDDEN, rows, experts, 1, 1)
    layout, tensors = synthetic_layer(synthetic_format(shape, center="none", **options), 0)
    library = native.load()
    if library is None:
        raise KernelUnsupportedError(f"there is no C++ kernel to be timed here: {native.loaded().words}")
    return native.NativeKernel(library, layout.bind(tensors), SILU)


def layer_us(run: native.NativeKernel, experts: int, seconds: float) -> float:
    """Median of a call with one token, each of the experts in turn."""
    x, weight = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.ones(1, 1)
    ids = torch.arange(experts, dtype=torch.int32).view(experts, 1, 1).unbind()
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < 8 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        run(x, weight, ids[len(taken) % experts])
        taken.append(time.perf_counter() - start)
    return 1e6 * statistics.median(taken[len(taken) // 4 :])


def weight_ns(options: dict[str, Any], rows: int, experts: int, seconds: float) -> float:
    """ns for a weight of the dense expert, by the difference between many rows and few."""
    many = layer_us(kernel(options, rows, experts), experts, seconds)
    few = layer_us(kernel(options, FEW_ROWS, experts), experts, seconds)
    return 1e3 * (many - few) / (3 * HIDDEN * (rows - FEW_ROWS))


def call_us(turns: int, between: Tensor | None) -> float:
    """Median of a call with one token of a layer whose kernel does nothing: what Python and torch take around it.

    Args:
        turns: of the median.
        between: is read before each call; None: nothing is.
    """
    run = kernel(CODERS["trellis 4 bits"], FEW_ROWS, 1)
    nothing = ctypes.CDLL(None)["getppid"]
    nothing.argtypes, nothing.restype = run._run.argtypes, None
    run._run = nothing
    x, weight, ids = torch.zeros(1, HIDDEN).bfloat16(), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
    taken = []
    for _ in range(turns):
        if between is not None:
            between.sum()
        start = time.perf_counter()
        run(x, weight, ids)
        taken.append(time.perf_counter() - start)
    return 1e6 * statistics.median(taken)


@click.command()
@click.option("--coder", "coders", multiple=True, type=click.Choice(list(CODERS)), help="Default: all.")
@click.option("--rows", default=512, show_default=True, type=click.IntRange(min=FEW_ROWS + 1), help="Of the expert.")
@click.option("--memory", default=256, show_default=True, help="MB of experts that are read in turn from memory.")
@click.option("--seconds", default=0.3, show_default=True, help="At least so long for each time.")
@click.option("--patience", default=60.0, show_default=True, help="Seconds of waiting for a quiet machine, in all.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows to FILE.")
def main(
    coders: tuple[str, ...], rows: int, memory: int, seconds: float, patience: float, json_file: Path | None
) -> None:
    """Time a weight of each coder, by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        machine = QuietMachine(1, patience, say=click.echo)
        found = list(_rows(coders or tuple(CODERS), rows, memory, seconds, machine))
    finally:
        torch.set_num_threads(threads)
    print_rows(found, f"the CPU kernel's weights, path {chosen_path()}, one thread")
    if json_file:
        write_rows(found, json_file)


def _rows(coders: tuple[str, ...], rows: int, memory: int, seconds: float, machine: QuietMachine) -> Iterator[Row]:
    for name in coders:
        options = CODERS[name]
        size = sum(tensor.nbytes for tensor in _tensors(options, rows))
        for where, experts in (("in cache", 1), ("from memory", max(2, memory * 10**6 // size))):
            value, noise = machine.measure(partial(weight_ns, options, rows, experts, seconds))
            context = {"coder": name, "experts": experts, "expert_bytes": size, "path": chosen_path()}
            around = noise.context(machine.best)
            label = f"{name}, {where}{', NOISY' if around['noisy'] else ''}"
            yield Row(label, value, "ns a weight", context={**context, **around})
    between = torch.ones(BETWEEN_BYTES // 4)
    for where, read in (("warm", None), (f"after {BETWEEN_BYTES // 2**20} MiB were read", between)):
        value, noise = machine.measure(partial(call_us, 200, read))
        around = noise.context(machine.best)
        label = f"Python and torch around the kernel, {where}{', NOISY' if around['noisy'] else ''}"
        yield Row.at_most(label, value, "us a call", OVERHEAD_US, path=chosen_path(), **around)


def _tensors(options: dict[str, Any], rows: int) -> list[Tensor]:
    shape = MoEShape("one", HIDDEN, rows, 1, 1, 1)
    return synthetic_layer(synthetic_format(shape, center="none", **options), 0)[1]


if __name__ == "__main__":
    main()
