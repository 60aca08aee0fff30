"""One sanitizer on one path, in a process that has its runtime preloaded: ``python -m tests.sanitize.run``.

Prints a line of counts. What a sanitizer finds ends the process with its report.
"""

import argparse
import ctypes
import os
import tempfile
from pathlib import Path

import torch

from compress_tools import native_library
from compress_tools.format.rest import encode_rows
from compress_tools.residuals.viterbi import native as viterbi
from compress_tools.residuals.viterbi.plain_torch import to_fixed
from resmoe_vllm.kernels.activation import SILU
from resmoe_vllm.kernels.cpu import build, native, rows8
from tests.resmoe_vllm.kernels.test_vllm_kernels import hidden_states, make_routing
from tests.resmoe_vllm.layers import bound_weights, layer_kinds, load_all, new_loader, store_layer

THREADS = 3
DTYPES = ("float32", "bfloat16", "float16")
# I and H: one of each, odd ones, one block and a bit, whole words of masks.
SHAPES = ((1, 3), (7, 67), (33, 129), (16, 64))
ROUTINGS = ("T1-KE", "T13-K2", "twice", "none")
SHIM = Path(__file__).with_name("pthread_omp.cpp")


def main() -> None:
    """Parse, build, run, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("flags", nargs="+", help="for the compiler, behind the kernels' own")
    parser.add_argument("--shim", action="store_true", help="threads by pthreads in place of libgomp")
    parser.add_argument("--mutants", type=int, default=0, help="changed checkpoints through the plugin's code")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(prefix="resmoe-sanitize-") as name:
        # For this process, which has it; the compiler needs no sanitizer's runtime in it.
        os.environ.pop("LD_PRELOAD", None)
        # Sanitised libraries are nobody else's.
        os.environ["XDG_CACHE_HOME"] = name
        shim = (str(SHIM), "-Wl,-Bsymbolic") if options.shim else ()
        flags = (*build.PATHS[build.chosen_path()].flags, *options.flags, *shim)
        library = native.open_library(str(native_library.build(build.SOURCE, *flags)))
        rows = ctypes.CDLL(str(native_library.build(rows8.SOURCE, *flags)))
        search = ctypes.CDLL(str(native_library.build(viterbi.SOURCE, *flags)))
        rows8._declare(rows)
        counts = [run_layers(library), run_rows(rows), run_search(search)]
        native.loaded = lambda: native.Loaded(library, "sanitised")
        counts.append(run_mutants(options.mutants) if options.mutants else 0)
    print("{} calls of layers, {} of rows, {} searches, {} changed checkpoints".format(*counts))


def run_layers(library: ctypes.CDLL) -> int:
    """Every coder in every dtype and shape: one token and many, a token that chose an expert twice, none at all."""
    calls = 0
    for dtype in DTYPES:
        for size_i, size_h in SHAPES:
            for spec in layer_kinds(size_i, size_h).values():
                layer = store_layer(spec, 4, size_i, size_h, dtype, biases=True)
                module, loader = new_loader(layer)
                load_all(module, loader, layer)
                kernel = native.NativeKernel(library, bound_weights(module, loader), SILU)
                for routing in ROUTINGS:
                    weights, ids = make_routing(4, "T13-K2" if routing in ("twice", "none") else routing)
                    if routing == "twice":
                        ids[:, 1] = ids[:, 0]
                    elif routing == "none":
                        ids.fill_(-1)
                    out = kernel(hidden_states(len(ids), size_h, dtype), weights, ids)
                    if not out.isfinite().all():
                        raise SystemExit(f"{spec.describe()} {dtype} {size_i}x{size_h} {routing}: not finite")
                    calls += 1
    return calls


def run_rows(library: ctypes.CDLL) -> int:
    """Matrices in 8-bit codes of odd shapes."""
    rows8._load.cache_clear()
    rows8._load = lambda: library
    calls = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, columns in ((1, 1), (5, 3), (7, 77), (33, 128), (64, 64)):
            codes, scales = encode_rows(torch.randn(rows, columns).to(dtype))
            for tokens in (1, 2, 5, 33):
                for bias in (None, torch.randn(rows)):
                    out = rows8.rows8(torch.randn(tokens, columns).to(dtype), codes, scales, bias)
                    if not out.isfinite().all():
                        raise SystemExit(f"rows {rows}x{columns}: not finite")
                    calls += 1
    return calls


def run_search(library: ctypes.CDLL) -> int:
    """The encoder's search for trellis codes."""
    calls = 0
    for bits in (1, 2, 3, 4):
        for rows, columns in ((1, 8), (3, 70), (2, 129)):
            for width, ratios in (
                (32, torch.rand(rows, -(-columns // 32)) + 0.5),
                (0, torch.rand(rows, columns) + 0.5),
            ):
                viterbi.search(library, to_fixed(40 * torch.randn(rows, columns)), bits, width, ratios)
                calls += 1
    return calls


def run_mutants(count: int) -> int:
    """Changed checkpoints of the fuzzer: those that load are run."""
    from compress_tools.errors import ResMoEError
    from tests.fuzz import loaders
    from tests.fuzz.seeds import make_seeds, write_files
    from tests.fuzz.workers import make_mutant

    served = 0
    with tempfile.TemporaryDirectory(prefix="resmoe-sanitize-") as name:
        seeds = make_seeds(Path(name) / "seeds")
        for number in range(count):
            folder = write_files(make_mutant(seeds, number).files, Path(name) / str(number))
            try:
                loaders.expect_block(folder)
                loaders.by_plugin(folder)
                served += 1
            except ResMoEError:
                continue
    if not served:
        raise SystemExit("no changed checkpoint was served")
    return count


if __name__ == "__main__":
    main()
