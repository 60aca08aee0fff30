"""`python -m benchmarks.kernels.host`: the host's time of one call of a layer on a GPU, measured without one.

Triton's own launcher runs as it does on a machine with a GPU, down to the driver; of that there is a library of the
same functions that do nothing. So what is left out is the driver's part of each launch and the GPU's. Inputs are on
the CPU, whose allocator, which keeps what is freed here, stands for the GPU's. A call in a CUDA graph takes none of
this time; others, prefill among them, take it for each layer.
"""

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.rows import Row, print_rows, write_rows

TARGET_US = 120
TOKENS = (1, 64, 512, 2048)
METHODS = ("low-rank", "prune", "quantize-4bit")
REPEATS = 200
# glibc's numbers of two limits above which memory goes back to the system
_TRIM, _MMAP = -1, -3
_SOURCE = """
#include <stddef.h>
#define NOTHING(name) int name() { return 0; }
NOTHING(cuInit) NOTHING(cuCtxGetDevice) NOTHING(cuCtxGetLimit) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSetLimit)
NOTHING(cuDeviceGet) NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig) NOTHING(cuGetErrorString)
NOTHING(cuLaunchKernelEx) NOTHING(cuModuleUnload) NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuTensorMapEncodeIm2col) NOTHING(cuTensorMapEncodeTiled) NOTHING(cuStreamIsCapturing)
NOTHING(cuPointerGetAttributes)
int cuDeviceGetCount(int *out) { *out = 1; return 0; }
int cuDriverGetVersion(int *out) { *out = 13000; return 0; }
int cuCtxGetCurrent(void **out) { *out = (void *)8; return 0; }
int cuDevicePrimaryCtxRetain(void **out, int device) { *out = (void *)8; return 0; }
int cuModuleLoadData(void **out, const void *image) { *out = (void *)8; return 0; }
int cuModuleGetFunction(void **out, void *module, const char *name) { *out = (void *)8; return 0; }
int cuFuncGetAttribute(int *out, int attribute, void *function) { *out = attribute == 0 ? 1024 : 0; return 0; }
int cuDeviceGetAttribute(int *out, int attribute, int device) { *out = 232448; return 0; }
int cuPointerGetAttribute(void *out, int attribute, size_t pointer) { *(size_t *)out = pointer; return 0; }
"""


def stand_in(folder: Path) -> None:
    """Build the driver's functions and load them in its place: from then on its name means them."""
    library = folder / "libcuda.so.1"
    (folder / "driver.c").write_text(_SOURCE)
    command = ["gcc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, folder / "driver.c"]
    subprocess.run(command, check=True)
    (folder / "libcuda.so").symlink_to(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    for limit in (_TRIM, _MMAP):
        ctypes.CDLL(None).mallopt(limit, 2**30)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)


def use_driver(card: str) -> None:
    """Let Triton launch by its own code for a card."""
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
    from triton.runtime import driver

    from benchmarks.compiled.cards import CARDS

    class Driver:
        """What Triton asks before it launches."""

        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

        def get_current_target(self) -> Any:
            return CARDS[card].target

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:  # noqa: ARG002 -- Triton's own signature
            return 0

    driver.set_active(Driver())


def measure(shape_name: str, method: str, tokens: int) -> float:
    """Microseconds of one call, the median."""
    import torch

    from benchmarks.compiled.layers import MATRIX_SHAPES, matrix_layer

    shape = MATRIX_SHAPES[shape_name]
    kernel = matrix_layer(shape, method, "bfloat16")
    x = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16)
    weights = torch.empty(tokens, shape.top_k)
    ids = torch.zeros(tokens, shape.top_k, dtype=torch.int32)
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        kernel(x, weights, ids)
        times.append(time.perf_counter() - began)
    return 1e6 * median(times)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; the exit code."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("benchmarks.kernels.host: unset TRITON_INTERPRET, which replaces the launches", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.host", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="OLMoE-1B-7B")
    parser.add_argument("--method", nargs="+", default=list(METHODS), metavar="NAME")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), metavar="T")
    parser.add_argument("--card", default="sm_90")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    options = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        stand_in(Path(scratch))
        use_driver(options.card)
        for method in options.method:
            for tokens in options.tokens:
                found = measure(options.shape, method, tokens)
                name = f"{options.shape} {method} T={tokens}: host time of a call"
                rows.append(Row.at_most(name, round(found, 1), "us", TARGET_US))
    print_rows(rows, title="host time of a layer call, no GPU")
    if options.json is not None:
        write_rows(rows, options.json)
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
