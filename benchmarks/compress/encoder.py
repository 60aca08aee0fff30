"""How fast trellis codes are found: weights a second on one thread by each path, and the time of a whole layer.

What they lose is measured by `benchmarks.coders`.
"""

import ctypes
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.compress.source import write_source
from benchmarks.harness.rows import Row
from benchmarks.harness.shapes import SHAPES, MoEShape
from compress_tools.config import make_config
from compress_tools.errors import KernelUnsupportedError
from compress_tools.native_library import build, cpu_flags
from compress_tools.numerics.parallel import one_thread_each
from compress_tools.pipeline import compress
from compress_tools.residuals.trellis import PASSES, trellis_rows
from compress_tools.residuals.viterbi import native, search

COLUMNS = 2048
BITS = (4, 3, 2, 1)
REPEATS = 3
# The project's targets: weights a second and thread at these widths, and minutes for OLMoE's layer on two cores.
TARGET, TARGET_BITS = 1.5e6, (2, 3, 4)
LAYER_SHAPE, LAYER_BITS, LAYER_TARGET, LAYER_WORKERS = "OLMoE-1B-7B", 4, 2.5, 2


@dataclass(frozen=True)
class SearchPath:
    """A way through the search.

    Attributes:
        name: as rows have it.
        needs: of the processor, as Linux names it.
        flags: of the compiler, so that it makes nothing wider; None for torch.
        rows: coded at a time: torch is 20 times as slow.
    """

    name: str
    needs: str | None
    flags: tuple[str, ...] | None
    rows: int


PATHS = (
    SearchPath("C++, AVX-512", "avx512f", (), 128),
    SearchPath("C++, AVX2", "avx2", ("-mno-avx512f",), 128),
    SearchPath("C++, 4 lanes", None, ("-mno-avx512f", "-mno-avx2"), 64),
    SearchPath("torch", None, None, 8),
)


def encoder_rows(paths: tuple[SearchPath, ...] = PATHS, rows: int | None = None) -> list[Row]:
    """Weights a second on one thread, gaussian rows, a scale for each; all passes and the choice of the scale counted.

    Paths that this processor or machine has not are left out: each row names its own.

    Args:
        paths: to be measured.
        rows: coded at a time, in place of each path's own number.
    """
    found = []
    # The widest path that is there is the one that `resmoe compress` takes: it has the targets.
    taken = True
    for path in paths:
        if path.needs is not None and path.needs not in cpu_flags():
            continue
        try:
            library = None if path.flags is None else ctypes.CDLL(str(build(native.SOURCE, *path.flags)))
        except (OSError, KernelUnsupportedError):
            continue  # no compiler: torch is what compresses
        for bits in BITS:
            rate = _rate(library, bits, rows or path.rows)
            name = f"trellis encoder, {bits} bits, {path.name}: weights a second, one thread"
            context = {"path": path.name, "bits": bits, "passes": PASSES, "columns": COLUMNS, "taken": taken}
            if taken and bits in TARGET_BITS:
                found.append(Row.at_least(name, rate, "1/s", TARGET, **context))
            else:
                found.append(Row(name, rate, "1/s", context=context))
        taken = False
    return found


def _rate(library: native.Library | None, bits: int, rows: int) -> float:
    matrix = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(0))
    seconds = []
    with one_thread_each(), patch.object(search, "_library", lambda: library):
        trellis_rows(matrix[:1], bits)
        for _ in range(1 if library is None else REPEATS):
            # Of this process alone: other work on the machine is not counted.
            begun = time.process_time()
            trellis_rows(matrix, bits)
            seconds.append(time.process_time() - begun)
    return matrix.numel() / statistics.median(seconds)


def layer_rows(shape: MoEShape = SHAPES[LAYER_SHAPE], workers: int = LAYER_WORKERS) -> list[Row]:
    """`resmoe compress --method trellis --center none` of one layer: read, coded, written."""
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: what making the weights takes is no part of it.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(write_source, Path(folder) / "source", shape, "unrelated").result()
        begun = time.perf_counter()
        config = make_config(method="trellis", bits=LAYER_BITS, center="none", workers=workers)
        report = compress(Path(folder) / "source", Path(folder) / "target", config)
        minutes = (time.perf_counter() - begun) / 60
    name = f"{shape.name}, one layer, trellis {LAYER_BITS} bits, no center, {workers} workers"
    context = {
        "weights": 3 * shape.experts * shape.intermediate * shape.hidden,
        "relative_error": report.relative_error,
        "bytes_ratio": report.expert_bytes_after / report.expert_bytes_before,
    }
    return [Row.at_most(name, minutes, "min", LAYER_TARGET, **context)]
