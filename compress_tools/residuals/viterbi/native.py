"""Calls csrc/viterbi.cpp."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from compress_tools.errors import KernelUnsupportedError
from compress_tools.format.trellis import tables
from compress_tools.native_library import NativeSource, build
from compress_tools.residuals.viterbi.plain_torch import to_fixed, torch_search

Library = ctypes.CDLL


def _check(library: Library) -> None:
    """Rows of noise, in groups, against torch.

    Raises:
        KernelUnsupportedError: other symbols; never seen.
    """
    generator = torch.Generator().manual_seed(0)
    x = to_fixed(40 * torch.randn(3, 70, generator=generator))
    ratios = 2 * torch.rand(3, 3, generator=generator)
    columns = torch.exp(2 * torch.randn(3, 70, generator=generator))
    for bits in (1, 2, 3, 4):
        same = [
            all(map(torch.equal, search(library, x, bits, width, own), torch_search(x, bits, width, own)))
            for width, own in ((32, ratios), (0, columns))
        ]
        if not all(same):
            raise KernelUnsupportedError(f"the C++ search for trellis codes finds other symbols at {bits} bits")


SOURCE = NativeSource(Path(__file__).parent / "csrc" / "viterbi.cpp", check=_check, tested_by=(Path(__file__),))


@cache
def load() -> Library:
    """The library, compiled now or before.

    Raises:
        OSError: no compiler, or no place for the library.
        CalledProcessError: the compiler refuses.
        KernelUnsupportedError: it is wrong on this processor.
    """
    return ctypes.CDLL(str(build(SOURCE)))


def search(
    library: Library, x: Tensor, bits: int, width: int, ratios: Tensor, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``torch_search``; on one thread. ``own``: other tables than the format's, of its shape."""
    x, ratios = x.contiguous(), ratios.float().contiguous()
    symbols, levels = torch.empty_like(x, dtype=torch.uint8), torch.empty_like(x, dtype=torch.int8)
    own = tables(bits) if own is None else own.contiguous()
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (own, x, ratios, symbols, levels)]
    size = ctypes.c_int64
    failed = library.resmoe_trellis_search(
        size(bits), *pointers[:2], size(len(x)), size(x.shape[1]), size(width), *pointers[2:]
    )
    if failed:
        raise KernelUnsupportedError(f"trellis codes have 1 to 4 bits, found {bits}")
    return symbols, levels
