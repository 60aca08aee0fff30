"""Builds, loads and calls csrc/fused_moe_cpu.cpp, the kernel of every coder on a CPU with AVX2.

The library is compiled on first use, for the processor it runs on, into the user's cache. Without a compiler or
AVX2, ``load`` says why and gives None, and the plain torch path, same result, serves instead.
"""

import ctypes
import functools
import hashlib
import itertools
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from compress_tools.errors import KernelUnsupportedError
from compress_tools.format.packing import pack_codes, pack_mask
from compress_tools.format.row_sizes import mask_row_bytes
from compress_tools.format.schema import Projection
from resmoe_vllm.weights.bound import (
    BitmapWeights,
    Coded,
    LowRankWeights,
    Matrix,
    QuantizedWeights,
    ResMoEWeights,
    RowBitmapWeights,
)
from resmoe_vllm.weights.layout import LayerLayout

SOURCE = Path(__file__).parent / "csrc" / "fused_moe_cpu.cpp"
HEADERS = (SOURCE.with_name("products.h"), SOURCE.with_name("rows.h"))
# No contraction: the compiler may not fuse a scalar tail in one loop and not in another, so sums stay the same sums.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
NEEDED_CPU_FLAGS = ("avx2", "bmi2", "fma", "f16c")

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}

_LAYERS_REMEMBERED = 1024

log = logging.getLogger(__name__)

Pointers = ctypes.c_void_p * 3
Strides = ctypes.c_int64 * 3


class _Matrix(ctypes.Structure):
    """Mirrors ``struct Matrix``."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("scales_stride", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("group", ctypes.c_int64),
    ]


Matrices = _Matrix * 3


class _Bitmap(ctypes.Structure):
    """Mirrors ``struct Bitmap``."""

    _fields_ = [
        ("mask", Pointers),
        ("row_ptr", Pointers),
        ("values", Pointers),
        ("scales", Pointers),
        ("starts", ctypes.c_void_p),
        ("mask_stride", Strides),
        ("row_ptr_stride", Strides),
        ("values_stride", Strides),
        ("scales_stride", Strides),
        ("starts_stride", ctypes.c_int64),
        ("readable", Strides),
        ("values_per_row", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("group", ctypes.c_int64),
    ]


class _LowRank(ctypes.Structure):
    """Mirrors ``struct LowRank``."""

    _fields_ = [("u", _Matrix), ("v", Matrices), ("rank", ctypes.c_int64)]


class _Quantized(ctypes.Structure):
    """Mirrors ``struct Quantized``."""

    _fields_ = [("rows", Matrices)]


class _Layer(ctypes.Structure):
    """Mirrors ``struct Layer``."""

    _fields_ = [
        ("hidden", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("experts", ctypes.c_int64),
        ("mask_bytes", ctypes.c_int64),
        ("center", Matrices),
        ("low_rank", ctypes.c_void_p),
        ("num_low_rank", ctypes.c_int64),
        ("bitmap", ctypes.c_void_p),
        ("num_bitmap", ctypes.c_int64),
        ("quantized", ctypes.c_void_p),
        ("num_quantized", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("activation", ctypes.c_int32),
    ]


_STRUCTS = (_Matrix, _Bitmap, _LowRank, _Quantized, _Layer)


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled library, or None with the reason logged.

    Raises:
        KernelUnsupportedError: the library decodes wrongly on this processor; never seen, checked at every start.
    """
    missing = _missing_cpu_flags()
    if missing:
        log.warning("resmoe: no C++ kernel, plain torch serves: the processor lacks %s", ", ".join(missing))
        return None
    try:
        library = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.CalledProcessError) as err:
        detail = getattr(err, "stderr", "") or str(err)
        log.warning(
            "resmoe: no C++ kernel, plain torch serves, slower, same result: %s; install g++ and start again",
            detail,
        )
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.resmoe_fused_moe.argtypes = [
        pointer,
        pointer,
        ctypes.c_int32,
        size,
        pointer,
        pointer,
        size,
        pointer,
        pointer,
        ctypes.c_int,
    ]
    library.resmoe_decode_row.argtypes = [ctypes.c_int32, size, pointer, pointer, pointer, *[size] * 3, pointer]
    library.resmoe_decode_codes.argtypes = [pointer, size, size, pointer]
    library.resmoe_decode_codes.restype = None
    library.resmoe_struct_bytes.restype = size
    _self_test(library)
    return library


def fused_moe(
    library: ctypes.CDLL,
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    tensors: list[Tensor],
    layout: LayerLayout,
    activation: str,
    expert_map: Tensor | None = None,
) -> Tensor:
    """See ``fused_moe_ref``; weights in one dtype or codes, contiguous, on the CPU; sums and activations in fp32."""
    layer = _layer(tensors, layout, activation)
    x, ids, weights = x.contiguous(), topk_ids.int().contiguous(), topk_weights.float().contiguous()
    mapping = None if expert_map is None else expert_map.int().contiguous()
    out = torch.empty_like(x)
    failed = library.resmoe_fused_moe(
        ctypes.addressof(layer.struct),
        x.data_ptr(),
        DTYPES[x.dtype],
        len(x),
        ids.data_ptr(),
        weights.data_ptr(),
        ids.shape[1],
        _pointer(mapping),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise KernelUnsupportedError(f"resmoe's C++ kernel does not know dtype number {layer.struct.dtype}")
    return out


class _Pointers:
    """One layer's struct, with the arrays it points to; no tensor is kept alive."""

    def __init__(self, weights: ResMoEWeights, activation: str) -> None:
        kinds = {LowRankWeights: _low_rank, BitmapWeights: _bitmap, RowBitmapWeights: _row_bitmap}
        made = [kinds.get(type(part), _quantized)(part) for part in weights.residual]
        low_rank, bitmap, quantized = (
            [part for part in made if isinstance(part, struct)] for struct in (_LowRank, _Bitmap, _Quantized)
        )
        self._arrays = (
            (_LowRank * len(low_rank))(*low_rank),
            (_Bitmap * len(bitmap))(*bitmap),
            (_Quantized * len(quantized))(*quantized),
        )
        self.struct = _Layer(
            weights.hidden_size,
            weights.intermediate_size,
            weights.num_experts,
            mask_row_bytes(weights.hidden_size),
            Matrices(*(_matrix(weights.center.get(p), shared=True) for p in PROJECTIONS)),
            ctypes.addressof(self._arrays[0]),
            len(low_rank),
            ctypes.addressof(self._arrays[1]),
            len(bitmap),
            ctypes.addressof(self._arrays[2]),
            len(quantized),
            DTYPES[_dtype(weights)],
            ACTIVATIONS[activation],
        )


# Building the struct takes longer than a small layer's forward. Layout, addresses and sizes determine all of it.
_remembered: OrderedDict[tuple[object, ...], _Pointers] = OrderedDict()


def _layer(tensors: list[Tensor], layout: LayerLayout, activation: str) -> _Pointers:
    key = (layout.key, activation, *((t.data_ptr(), t.numel(), t.dtype) for t in tensors))
    found = _remembered.get(key)
    if found is None:
        found = _remembered[key] = _Pointers(layout.bind(tensors), activation)
        while len(_remembered) > _LAYERS_REMEMBERED:
            _remembered.popitem(last=False)
    return found


def _matrix(rows: Matrix | None, shared: bool = False) -> _Matrix:
    """``[E, I, columns]``, or, shared by all experts, ``[I, columns]``: stride 0."""
    if rows is None:
        return _Matrix()
    if isinstance(rows, Tensor):
        return _Matrix(rows.data_ptr(), None, 0 if shared else rows.stride(0), 0, 0, 0)
    strides = (0, 0) if shared else (rows.codes.stride(0), rows.scales.stride(0))
    group = _whole_row(rows.columns) if rows.group_size is None else rows.group_size
    return _Matrix(rows.codes.data_ptr(), rows.scales.data_ptr(), *strides, rows.bits, group)


def _whole_row(columns: int) -> int:
    return columns + 8


def _low_rank(part: LowRankWeights) -> _LowRank:
    return _LowRank(_matrix(part.u), Matrices(*(_matrix(part.v.get(p)) for p in PROJECTIONS)), part.rank)


def _quantized(part: QuantizedWeights) -> _Quantized:
    return _Quantized(Matrices(*(_matrix(part.rows.get(p)) for p in PROJECTIONS)))


def _bitmap(part: BitmapWeights) -> _Bitmap:
    values = dict.fromkeys(part.projections, part.values)
    made = _any_bitmap(part, values, part.row_ptr)
    if part.starts is not None:
        made.starts, made.starts_stride = part.starts.data_ptr(), part.starts.stride(0)
        made.values_stride = Strides(0, 0, 0)
    return made


def _row_bitmap(part: RowBitmapWeights) -> _Bitmap:
    made = _any_bitmap(part, part.values, {})
    made.values_per_row = part.values_per_row
    return made


def _any_bitmap(
    part: BitmapWeights | RowBitmapWeights, values: dict[Projection, Tensor], row_ptr: dict[Projection, Tensor]
) -> _Bitmap:
    tables = (part.mask, row_ptr, values, part.scales or {})
    mask, rows, kept, scales = ([table.get(p) for p in PROJECTIONS] for table in tables)
    columns = 8 * next(iter(part.mask.values())).shape[-1]
    made = _Bitmap(bits=part.value_bits or 0, group=part.group_size or _whole_row(columns))
    made.mask, made.row_ptr, made.values, made.scales = (
        Pointers(*map(_pointer, tensors)) for tensors in (mask, rows, kept, scales)
    )
    made.mask_stride, made.row_ptr_stride, made.values_stride, made.scales_stride = (
        Strides(*(0 if t is None else t.stride(0) for t in tensors)) for tensors in (mask, rows, kept, scales)
    )
    made.readable = Strides(*(0 if t is None else _elements_from(t) for t in kept))
    return made


def _elements_from(tensor: Tensor) -> int:
    """Elements of the tensor's memory from its first one on."""
    return tensor.untyped_storage().nbytes() // tensor.itemsize - tensor.storage_offset()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _dtype(weights: ResMoEWeights) -> torch.dtype:
    """What weights in the model's dtype are in; any where there are none."""
    matrices: list[Matrix] = list(weights.center.values())
    for part in weights.residual:
        if isinstance(part, LowRankWeights):
            matrices.append(part.u)
        elif isinstance(part, BitmapWeights):
            matrices.append(part.values)
        elif isinstance(part, RowBitmapWeights):
            matrices.extend(part.values.values())
    stored = (matrix.dtype for matrix in matrices if isinstance(matrix, Tensor) and matrix.dtype != torch.uint8)
    return next(stored, torch.float32)


def _missing_cpu_flags() -> list[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["the x86-64 instruction set"]
    try:
        line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return ["/proc/cpuinfo"]
    return [flag for flag in NEEDED_CPU_FLAGS if flag not in line.split()]


def _build() -> Path:
    """Compile, unless this source, compiler and processor were compiled for before."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("found neither g++ nor clang++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    model = next((s for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("flags")), "")
    sources = [path.read_text() for path in (SOURCE, *HEADERS)]
    identity = "\n".join([*sources, version, model, *FLAGS])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resmoe"
    target = cache / f"fused_moe_cpu-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Workers may build at the same time: each its own file, the last rename wins.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / target.name
            subprocess.run(
                [compiler, *FLAGS, str(SOURCE), "-o", str(built)], capture_output=True, text=True, check=True
            )
            os.replace(built, target)
    return target


def _self_test(library: ctypes.CDLL) -> None:
    """Struct layout, and decoding of bitmaps and codes against torch: the instructions depend on the processor."""
    if library.resmoe_struct_bytes() != sum(map(ctypes.sizeof, _STRUCTS)):
        raise KernelUnsupportedError("resmoe's C++ kernel and native.py disagree on their structs")
    columns = 333
    keep = torch.rand(columns, generator=torch.Generator().manual_seed(0)) < 0.4
    values = torch.randn(int(keep.sum()), generator=torch.Generator().manual_seed(1))
    mask = pack_mask(keep[None])
    generator = torch.Generator().manual_seed(2)

    def check_row(
        what: object, dtype: int, bits: int, stored: Tensor, scales: Tensor | None, group_size: int, expected: Tensor
    ) -> None:
        out = torch.empty(columns)
        room = stored.numel() * 8 // bits if bits else stored.numel()
        pointers = mask.data_ptr(), stored.data_ptr(), _pointer(scales)
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
    for bits in (2, 3, 4, 8):
        for group_size in (None, 32):
            codes = torch.randint(2**bits, (3, columns), generator=generator).byte()
            scales = torch.rand(3, 1 if group_size is None else -(-columns // 32), generator=generator).bfloat16()
            rows = Coded(pack_codes(codes, bits), scales, bits, columns, group_size)
            struct = _matrix(rows, shared=True)
            out = torch.empty(columns + 8)
            library.resmoe_decode_codes(ctypes.addressof(struct), 1, columns, out.data_ptr())
            if not torch.equal(out[:columns], rows.to(torch.float32)[1]):
                raise KernelUnsupportedError(f"resmoe's C++ kernel decodes {bits}-bit codes wrongly on this processor")
