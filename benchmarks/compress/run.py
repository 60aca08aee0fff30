"""Compress one layer as `resmoe compress` does, by both methods on one center; time, work and memory by stage."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.compress.source import Kind
from benchmarks.harness.shapes import MoEShape
from compress_tools.center.barycenter import CenterOptions, CenterResult, find_center
from compress_tools.config import make_config
from compress_tools.format.dtypes import DTYPES
from compress_tools.format.tensors import layer_tensors, tensor_name
from compress_tools.layer import code_layer
from compress_tools.numerics import products
from compress_tools.numerics.clock import StageClock
from compress_tools.numerics.parallel import in_parallel
from compress_tools.numerics.products import product, squared_norm
from compress_tools.numerics.work import Work
from compress_tools.output.target import make_target
from compress_tools.output.writer import CheckpointWriter
from compress_tools.progress.listener import Silent
from compress_tools.residuals.svd import left_singular_vectors, tail_energy
from compress_tools.source.layer_weights import read_layer
from compress_tools.source.source_reader import SourceReader

TIMED_METHODS = ("prune", "low-rank")
STAGES = ("read", "cost matrix", "assignment", "center", "residual prune", "residual low-rank", "write")


@dataclass(frozen=True)
class LayerRun:
    """What one layer took.

    Attributes:
        seconds: by stage; "assignment" is what the products did not hide.
        limit_s: by stage, its products at the measured rate of a large fp32 product, or its bytes at the measured
            rate of a copy or of the disk.
        peak_gb: peak resident memory of the process until then, 1e9 bytes.
        objective: the barycenter objective after each iteration.
        start: the start that won.
        gap: largest relative duality gap.
        errors: relative error by method.
        excess: relative excess of the low-rank route's error over the exact tail, expert 0; None if not asked for.
    """

    shape: str
    kind: Kind
    seconds: dict[str, float]
    limit_s: dict[str, float]
    peak_gb: float
    objective: list[float]
    start: str
    gap: float
    errors: dict[str, float]
    excess: float | None
    gflops: float
    copy_gb_s: float
    disk_gb_s: float


def product_rate(size: int = 4096) -> float:
    """fp32 operations per second of a large product, best of three."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        product(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def copy_rate(num_bytes: int = 2**29) -> float:
    """Bytes per second of a copy in memory, read and write counted once each; best of three."""
    source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.empty(num_bytes, dtype=torch.uint8)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return num_bytes / best


def disk_rate(directory: Path, num_bytes: int = 2**28) -> float:
    """Bytes per second of a synced write."""
    file = directory / "rate.bin"
    content = os.urandom(num_bytes)
    start = time.perf_counter()
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    rate = num_bytes / (time.perf_counter() - start)
    file.unlink()
    return rate


def peak_memory() -> int:
    """Peak resident bytes of this process; getrusage would count what its parent held when it was started."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def run_layer(source: Path, work: Path, shape: MoEShape, kind: Kind, workers: int, *, check_svd: bool) -> LayerRun:
    """Read, align, code and write the checkpoint at ``source`` into ``work``."""
    rates = product_rate(), copy_rate(), disk_rate(work)
    reader, silent, clock = SourceReader(source), Silent(), StageClock()
    targets = {method: make_target(reader, make_config(method=method, workers=workers)) for method in TIMED_METHODS}
    config = make_config(workers=workers)
    weights = read_layer(targets["prune"].source, 0, DTYPES[targets["prune"].fmt.dtype], "cpu", silent, clock)
    work_done: dict[str, int] = {}
    with _counted() as operations:
        options = CenterOptions("barycenter", config.max_iterations, config.tolerance)
        found = find_center(weights.design, options, Work(workers, clock=clock))
    work_done["cost matrix"] = sum(operations)
    energy = sum(in_parallel(squared_norm, weights.design, workers))
    errors, written = {}, 0
    for method, target in targets.items():
        coding = StageClock()
        with _counted() as operations:
            coded = code_layer(target, 0, weights, found, config.seed, Work(workers, silent, coding))
        work_done[f"residual {method}"] = sum(operations)
        clock.seconds[f"residual {method}"] = coding.seconds["residual"]
        errors[method] = sum(coded.errors) / energy
        tensors = {tensor_name(target.fmt, 0, None, *key): tensor for key, tensor in coded.shared.items()}
        for expert, stored in enumerate(coded.experts):
            tensors.update({tensor_name(target.fmt, 0, expert, *key): tensor for key, tensor in stored.items()})
        del coded
        written += sum(tensor.nbytes for tensor in tensors.values())
        with clock.stage("write"), CheckpointWriter(work / method, {"benchmark": method}) as writer:
            writer.write_shard("layer.safetensors", {name: tensors[name] for name in layer_tensors(target.fmt, 0)}, {})
        del tensors
    peak = peak_memory()
    limit = {stage: operations / rates[0] for stage, operations in work_done.items()}
    limit["read"] = weights.design.nbytes / rates[1]
    # Each round adds every expert up, and takes its distance from the mean.
    limit["center"] = len(found.objective) * 2 * weights.design.nbytes / rates[1]
    limit["write"] = written / rates[2]
    # Pruning makes no products: at the least, each expert is read and written once in fp32.
    limit["residual prune"] = 2 * 2 * weights.design.nbytes / rates[1]
    return LayerRun(
        shape=shape.name,
        kind=kind,
        seconds=clock.seconds,
        limit_s=limit,
        peak_gb=peak / 1e9,
        objective=[value / energy for value in found.objective],
        start=found.start,
        gap=found.gap,
        errors=errors,
        excess=_svd_excess(targets["low-rank"].fmt.layers[0].residual[0].rank, weights.design[0], found)
        if check_svd
        else None,
        gflops=rates[0] / 1e9,
        copy_gb_s=rates[1] / 1e9,
        disk_gb_s=rates[2] / 1e9,
    )


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Operations of every large product that is made meanwhile, on any thread."""
    operations: list[int] = []
    multiply = products._multiply_on_cpu

    def counting(left: Tensor, right: Tensor, out: Tensor) -> None:
        operations.append(2 * left.shape[0] * left.shape[1] * right.shape[1])
        multiply(left, right, out)

    with patch.object(products, "_multiply_on_cpu", counting):
        yield operations


def _svd_excess(rank: int, design: torch.Tensor, found: CenterResult) -> float:
    """How much more than the exact tail the chosen route loses on expert 0's residual, relative."""
    residual = design[found.perm[0]].float() - found.center
    left = left_singular_vectors(residual, rank)
    lost = residual - left @ (left.T @ residual)
    return lost.square().sum(dtype=torch.float64).item() / tail_energy(residual, rank) - 1
