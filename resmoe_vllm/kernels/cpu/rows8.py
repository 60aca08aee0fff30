"""Products with matrices in 8-bit codes by row on a CPU, in C++: the experts' integer dots (csrc/dots.h).

Without a compiler, or AVX2 or NEON, torch multiplies decoded blocks, same result.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from compress_tools import native_library
from compress_tools.errors import KernelUnsupportedError
from compress_tools.format.dtypes import DTYPES as DTYPES_OF_FORMAT
from compress_tools.format.parts.base import SCALE_DTYPE
from compress_tools.format.rest import LEVELS, decode_rows
from compress_tools.native_library import NativeSource
from resmoe_vllm.kernels.cpu.build import PATHS, chosen_path
from resmoe_vllm.kernels.cpu.native import open_or_reason
from resmoe_vllm.kernels.cpu.structs import DTYPES, pointer_to

# Weights of a decoded block.
BLOCK = 2**20


def rows8_ref(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ (codes * scales).T + bias`` in fp32, then in x's dtype.

    Args:
        x: ``[T, K]``.
        codes: int8 ``[N, K]``.
        scales: ``[N, 1]``.
        bias: ``[N]``, or None.
    Returns:
        ``[T, N]``.
    """
    out = x.float() @ (codes.float() * scales.float()).T
    return (out if bias is None else out + bias.float()).to(x.dtype)


def rows8(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """See ``rows8_ref``; all contiguous, on the CPU."""
    library = _load()
    if library is None:
        return _by_blocks(x, codes, scales, bias)
    out = torch.empty(len(x), len(codes), dtype=x.dtype)
    _call(library, x, codes, scales, None if bias is None else bias.float(), out, torch.get_num_threads())
    return out


def _call(
    library: ctypes.CDLL, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor, threads: int
) -> None:
    library.resmoe_rows8(
        codes.data_ptr(),
        scales.data_ptr(),
        pointer_to(bias),
        x.data_ptr(),
        len(x),
        *codes.shape,
        out.data_ptr(),
        DTYPES[x.dtype],
        threads,
    )


def _by_blocks(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Weights decoded to x's dtype, a block of rows at a time."""
    rows = max(1, BLOCK // max(codes.shape[1], 1))
    out = torch.empty(len(x), len(codes), dtype=x.dtype)
    for begin in range(0, len(codes), rows):
        part = slice(begin, begin + rows)
        weight = decode_rows(codes[part], scales[part], x.dtype)
        out[:, part] = functional.linear(x, weight, None if bias is None else bias[part].to(x.dtype))
    return out


def kernel_name() -> str:
    """What multiplies, for people."""
    return "torch, decoded for each call" if _load() is None else "the C++ kernel"


def _check(library: ctypes.CDLL) -> None:
    """What a freshly built library must pass: odd sizes, with a bias and without, against plain torch.

    Raises:
        KernelUnsupportedError: it multiplies wrongly.
    """
    _declare(library)
    generator = torch.Generator().manual_seed(0)
    for tokens, rows, columns in ((1, 5, 3), (2, 4, 8), (4, 7, 77), (3, 33, 600)):
        codes = torch.randint(-LEVELS, LEVELS + 1, (rows, columns), generator=generator).to(torch.int8)
        scales = torch.rand(rows, 1, generator=generator).to(DTYPES_OF_FORMAT[SCALE_DTYPE])
        x, bias = torch.randn(tokens, columns, generator=generator), torch.randn(rows, generator=generator)
        out = torch.empty(tokens, rows)
        for shift in (None, bias):
            _call(library, x, codes, scales, shift, out, 1)
            if not torch.allclose(out, rows8_ref(x, codes, scales, shift), rtol=1e-4, atol=1e-2):
                raise KernelUnsupportedError("resmoe's C++ kernel multiplies 8-bit rows wrongly on this processor")


SOURCE = NativeSource(
    Path(__file__).parent / "csrc" / "rows8_cpu.cpp", check=_check, tested_by=(Path(__file__),), flags=("-fopenmp",)
)


@functools.cache
def _load() -> ctypes.CDLL | None:
    found = open_or_reason(_opened, "C++ kernel for 8-bit rows, torch serves", [])
    return None if isinstance(found, str) else found


def _opened(say: Callable[[str], None]) -> ctypes.CDLL:
    library = ctypes.CDLL(str(native_library.build(SOURCE, *PATHS[chosen_path()].flags, say=say)))
    _declare(library)
    return library


def _declare(library: ctypes.CDLL) -> None:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.resmoe_rows8.argtypes = [*[pointer] * 4, *[size] * 3, pointer, ctypes.c_int32, ctypes.c_int]
    library.resmoe_rows8.restype = None
