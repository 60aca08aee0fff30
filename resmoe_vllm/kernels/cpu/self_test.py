"""What a freshly built library must pass before it enters the cache: its structs, and its decoding against torch.

Which instructions it decodes with depends on the processor that it was compiled for.
"""

import ctypes
import itertools

import torch
from torch import Tensor

from compress_tools.errors import KernelUnsupportedError
from compress_tools.format.packing import pack_codes, pack_mask
from resmoe_vllm.kernels.cpu.structs import DTYPES, matrix_struct, pointer_to, struct_fields
from resmoe_vllm.weights.bound import Coded

# not a multiple of 64, of 32 or of 8; more than twice what is decoded at a time
COLUMNS = 333


def check_library(library: ctypes.CDLL) -> None:
    """All of it.

    Raises:
        KernelUnsupportedError: a struct's field lies elsewhere than Python has it, or a row is decoded wrongly.
    """
    check_structs(library)
    check_bitmaps(library)
    check_codes(library)


def check_structs(library: ctypes.CDLL) -> None:
    """Each field of each struct: its name, where it begins and how long it is.

    Raises:
        KernelUnsupportedError: they differ; names the first.
    """
    library.resmoe_struct_fields.restype = ctypes.c_char_p
    found, expected = library.resmoe_struct_fields().decode().splitlines(), struct_fields()
    for line, ours in itertools.zip_longest(found, expected, fillvalue="nothing"):
        if line != ours:
            raise KernelUnsupportedError(
                f"resmoe's C++ kernel has {line!r} (field, offset, bytes) where structs.py has {ours!r}; "
                f"install resmoe again, its files are of different versions"
            )


def check_bitmaps(library: ctypes.CDLL) -> None:
    """Rows of bitmaps in every form of values.

    Raises:
        KernelUnsupportedError: one is decoded wrongly.
    """
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    library.resmoe_decode_row.argtypes = [ctypes.c_int32, size, pointer, pointer, pointer, *[size] * 3, pointer]
    columns = COLUMNS
    keep = torch.rand(columns, generator=torch.Generator().manual_seed(0)) < 0.4
    values = torch.randn(int(keep.sum()), generator=torch.Generator().manual_seed(1))
    mask = pack_mask(keep[None])
    generator = torch.Generator().manual_seed(2)

    def check_row(
        what: object, dtype: int, bits: int, stored: Tensor, scales: Tensor | None, group_size: int, expected: Tensor
    ) -> None:
        out = torch.empty(columns)
        room = stored.numel() * 8 // bits if bits else stored.numel()
        pointers = mask.data_ptr(), stored.data_ptr(), pointer_to(scales)
        library.resmoe_decode_row(dtype, bits, *pointers, group_size, room, columns, out.data_ptr())
        if not torch.equal(out, expected):
            raise KernelUnsupportedError(f"resmoe's C++ kernel decodes {what} bitmaps wrongly on this processor")

    for slack in (0, columns + 72):  # without room behind the values, where scalars serve, and with it
        for dtype, number in DTYPES.items():
            stored = torch.cat([values, torch.full((slack,), 7.0)]).to(dtype)
            expected = torch.zeros(columns).masked_scatter_(keep, values.to(dtype).float())
            check_row(dtype, number, 0, stored, None, 0, expected)
        for bits, group_size in itertools.product((4, 8), (32, 64, 128, columns)):
            codes = torch.randint(2**bits, (1, len(values) + slack), generator=generator).byte()
            scales = torch.rand(-(-columns // group_size), generator=generator).bfloat16()
            levels = codes[0, : len(values)].float() - (2**bits - 1) / 2
            expected = torch.zeros(columns).masked_scatter_(keep, levels)
            expected *= scales.float().repeat_interleave(group_size)[:columns]
            check_row(f"{bits}-bit", 0, bits, pack_codes(codes, bits), scales, group_size, expected)


def check_codes(library: ctypes.CDLL) -> None:
    """Rows of codes of every width.

    Raises:
        KernelUnsupportedError: one is decoded wrongly.
    """
    library.resmoe_decode_codes.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    library.resmoe_decode_codes.restype = None
    columns, generator = COLUMNS, torch.Generator().manual_seed(2)
    widths = [(bits, False) for bits in (2, 3, 4, 8)] + [(bits, True) for bits in (1, 2, 3, 4)]
    for bits, trellis in widths:
        for group_size in (None, 32):
            codes = torch.randint(2**bits, (3, columns), generator=generator).byte()
            scales = torch.rand(3, 1 if group_size is None else -(-columns // 32), generator=generator).bfloat16()
            rows = Coded(pack_codes(codes, bits), scales, bits, columns, group_size, trellis)
            struct = matrix_struct(rows, shared=True)
            out = torch.empty(columns + 8)
            library.resmoe_decode_codes(ctypes.addressof(struct), 1, columns, out.data_ptr())
            if not torch.equal(out[:columns], rows.to(torch.float32)[1]):
                kind = "trellis codes" if trellis else "codes"
                raise KernelUnsupportedError(f"resmoe's C++ kernel decodes {bits}-bit {kind} wrongly on this processor")
