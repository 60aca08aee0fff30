"""Builds, loads and calls csrc/fused_moe_cpu.cpp, the kernel for few tokens on a CPU with AVX2.

The library is compiled on first use, for the processor it runs on, into the user's cache. Without a compiler or
AVX2, ``load`` says why and gives None, and the plain torch path, same result, serves instead.
"""

import ctypes
import functools
import hashlib
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
from compress_tools.format.schema import Projection
from resmoe_vllm.kernel_weights import BitmapWeights, Coded, LowRankWeights, QuantizedWeights, ResMoEWeights
from resmoe_vllm.kernels.routing import local_ids
from resmoe_vllm.layout import LayerLayout

SOURCE = Path(__file__).parent / "csrc" / "fused_moe_cpu.cpp"
# No contraction: the compiler may not fuse a scalar tail in one loop and not in another, so sums stay the same sums.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
NEEDED_CPU_FLAGS = ("avx2", "fma", "f16c")

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}

_LAYERS_REMEMBERED = 1024

log = logging.getLogger(__name__)

Pointers = ctypes.c_void_p * 3
Strides = ctypes.c_int64 * 3


class _LowRank(ctypes.Structure):
    """Mirrors ``struct LowRank``."""

    _fields_ = [
        ("u", ctypes.c_void_p),
        ("v", Pointers),
        ("u_stride", ctypes.c_int64),
        ("v_stride", Strides),
        ("rank", ctypes.c_int64),
    ]


class _Bitmap(ctypes.Structure):
    """Mirrors ``struct Bitmap``."""

    _fields_ = [
        ("mask", Pointers),
        ("row_ptr", Pointers),
        ("values", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("mask_stride", Strides),
        ("row_ptr_stride", Strides),
        ("starts_stride", ctypes.c_int64),
        ("values_stride", ctypes.c_int64),
        ("num_values", ctypes.c_int64),
    ]


class _Quantized(ctypes.Structure):
    """Mirrors ``struct Quantized``."""

    _fields_ = [
        ("codes", Pointers),
        ("scales", Pointers),
        ("codes_stride", Strides),
        ("scales_stride", Strides),
        ("bits", ctypes.c_int64),
        ("group", ctypes.c_int64),
    ]


class _Layer(ctypes.Structure):
    """Mirrors ``struct Layer``."""

    _fields_ = [
        ("hidden", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("mask_bytes", ctypes.c_int64),
        ("center", Pointers),
        ("low_rank", ctypes.c_void_p),
        ("num_low_rank", ctypes.c_int64),
        ("bitmap", ctypes.c_void_p),
        ("num_bitmap", ctypes.c_int64),
        ("quantized", ctypes.c_void_p),
        ("num_quantized", ctypes.c_int64),
        ("center_codes", ctypes.c_void_p),
        ("num_center_codes", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("activation", ctypes.c_int32),
    ]


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
        size,
        pointer,
        pointer,
        pointer,
        size,
        pointer,
        ctypes.c_int,
    ]
    library.resmoe_decode_row.argtypes = [ctypes.c_int32, pointer, pointer, size, size, pointer]
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
    ids, order = local_ids(topk_ids, expert_map).flatten().sort(stable=True)
    skipped = int((ids < 0).sum())
    experts = ids[skipped:].int()
    tokens = (order[skipped:] // max(topk_ids.shape[1], 1)).int()
    weights = topk_weights.flatten().float()[order[skipped:]]
    wide = x.float().contiguous()
    out = torch.empty_like(wide)
    failed = library.resmoe_fused_moe(
        ctypes.addressof(layer.struct),
        wide.data_ptr(),
        len(wide),
        tokens.data_ptr(),
        experts.data_ptr(),
        weights.data_ptr(),
        len(experts),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise KernelUnsupportedError(f"resmoe's C++ kernel does not know dtype number {layer.struct.dtype}")
    return out.to(x.dtype)


class _Pointers:
    """One layer's struct, with the arrays it points to; no tensor is kept alive."""

    def __init__(self, weights: ResMoEWeights, activation: str) -> None:
        low_rank = [_low_rank(part) for part in weights.residual if isinstance(part, LowRankWeights)]
        bitmap = [_bitmap(part) for part in weights.residual if isinstance(part, BitmapWeights)]
        quantized = [_quantized(part.rows) for part in weights.residual if isinstance(part, QuantizedWeights)]
        coded = [(p, center) for p, center in weights.center.items() if isinstance(center, Coded)]
        center_codes = [_quantized({p: center}) for p, center in coded]
        dense_center = {p: center for p, center in weights.center.items() if isinstance(center, Tensor)}
        self._arrays = (
            (_LowRank * len(low_rank))(*low_rank),
            (_Bitmap * len(bitmap))(*bitmap),
            (_Quantized * len(quantized))(*quantized),
            (_Quantized * len(center_codes))(*center_codes),
        )
        masks = [part.mask for part in weights.residual if isinstance(part, BitmapWeights)]
        self.struct = _Layer(
            weights.hidden_size,
            weights.intermediate_size,
            next(iter(masks[0].values())).shape[-1] if masks else 0,
            Pointers(*(_pointer(dense_center.get(p)) for p in PROJECTIONS)),
            ctypes.addressof(self._arrays[0]),
            len(low_rank),
            ctypes.addressof(self._arrays[1]),
            len(bitmap),
            ctypes.addressof(self._arrays[2]),
            len(quantized),
            ctypes.addressof(self._arrays[3]),
            len(center_codes),
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


def _low_rank(part: LowRankWeights) -> _LowRank:
    v = [part.v.get(p) for p in PROJECTIONS]
    return _LowRank(
        _pointer(part.u),
        Pointers(*map(_pointer, v)),
        part.u.stride(0),
        Strides(*(0 if t is None else t.stride(0) for t in v)),
        part.u.shape[-1],
    )


def _bitmap(part: BitmapWeights) -> _Bitmap:
    mask, rows = ([table.get(p) for p in PROJECTIONS] for table in (part.mask, part.row_ptr))
    return _Bitmap(
        Pointers(*map(_pointer, mask)),
        Pointers(*map(_pointer, rows)),
        _pointer(part.values),
        _pointer(part.starts),
        Strides(*(0 if t is None else t.stride(0) for t in mask)),
        Strides(*(0 if t is None else t.stride(0) for t in rows)),
        0 if part.starts is None else part.starts.stride(0),
        part.values.stride(0) if part.starts is None else 0,
        part.values.untyped_storage().nbytes() // part.values.itemsize - part.values.storage_offset(),
    )


def _quantized(rows: dict[Projection, Coded]) -> _Quantized:
    """A residual's ``[E, I, H]`` for each projection, or a center's ``[I, H]``: one expert, stride 0."""
    coded = [rows.get(p) for p in PROJECTIONS]
    first = next(iter(rows.values()))
    group = first.columns + 8 if first.group_size is None else first.group_size
    return _Quantized(
        Pointers(*(None if own is None else own.codes.data_ptr() for own in coded)),
        Pointers(*(None if own is None else own.scales.data_ptr() for own in coded)),
        Strides(*(0 if own is None or own.codes.dim() == 2 else own.codes.stride(0) for own in coded)),
        Strides(*(0 if own is None or own.scales.dim() == 2 else own.scales.stride(0) for own in coded)),
        first.bits,
        group,
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _dtype(weights: ResMoEWeights) -> torch.dtype:
    """What weights in the model's dtype are in; any where there are none."""
    for part in weights.residual:
        if isinstance(part, BitmapWeights):
            return part.values.dtype
        if isinstance(part, LowRankWeights):
            return part.u.dtype
    return next((center.dtype for center in weights.center.values() if isinstance(center, Tensor)), torch.float32)


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
    identity = "\n".join([SOURCE.read_text(), version, model, *FLAGS])
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
    if library.resmoe_struct_bytes() != sum(map(ctypes.sizeof, (_LowRank, _Bitmap, _Quantized, _Layer))):
        raise KernelUnsupportedError("resmoe's C++ kernel and cpp_cpu.py disagree on their structs")
    columns = 333
    keep = torch.rand(columns, generator=torch.Generator().manual_seed(0)) < 0.4
    values = torch.randn(int(keep.sum()), generator=torch.Generator().manual_seed(1))
    mask = pack_mask(keep[None])
    for dtype, number in DTYPES.items():
        for slack in (0, 100):  # with room behind the values, and without
            stored = torch.cat([values, torch.full((slack,), 7.0)]).to(dtype)
            out = torch.empty(columns)
            library.resmoe_decode_row(number, mask.data_ptr(), stored.data_ptr(), len(stored), columns, out.data_ptr())
            expected = torch.zeros(columns).masked_scatter_(keep, values.to(dtype).float())
            if not torch.equal(out, expected):
                raise KernelUnsupportedError(f"resmoe's C++ kernel decodes {dtype} bitmaps wrongly on this processor")
    for bits in (2, 3, 4, 8):
        for group_size in (None, 32):
            codes = torch.randint(2**bits, (3, columns), generator=torch.Generator().manual_seed(bits)).byte()
            scales = torch.rand(3, 1 if group_size is None else -(-columns // 32)).bfloat16()
            rows = Coded(pack_codes(codes, bits), scales, bits, columns, group_size)
            struct = _quantized({"gate_proj": rows})
            out = torch.empty(columns + 8)
            library.resmoe_decode_codes(ctypes.addressof(struct), 1, columns, out.data_ptr())
            if not torch.equal(out[:columns], rows.to(torch.float32)[1]):
                raise KernelUnsupportedError(f"resmoe's C++ kernel decodes {bits}-bit codes wrongly on this processor")
