"""A bound layer as the C++ kernel takes it: the structs of csrc/abi.h, field by field."""

import ctypes
import functools
import math

import torch
from torch import Tensor

from compress_tools.format import trellis
from compress_tools.format.row_sizes import mask_row_bytes
from compress_tools.format.schema import Projection
from resmoe_vllm.kernels.activation import Activation
from resmoe_vllm.weights.bound import (
    BitmapWeights,
    LowRankWeights,
    Matrix,
    QuantizedWeights,
    ResMoEWeights,
    RowBitmapWeights,
)

PROJECTIONS: tuple[Projection, ...] = ("gate_proj", "up_proj", "down_proj")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FUNCTIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu2": 3}

Pointers = ctypes.c_void_p * 3
Strides = ctypes.c_int64 * 3


class MatrixStruct(ctypes.Structure):
    """Mirrors ``struct Matrix``."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("scales_stride", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("tables", ctypes.c_void_p),
    ]


Matrices = MatrixStruct * 3


class BitmapStruct(ctypes.Structure):
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


class LowRankStruct(ctypes.Structure):
    """Mirrors ``struct LowRank``."""

    _fields_ = [("u", MatrixStruct), ("v", Matrices), ("rank", ctypes.c_int64)]


class QuantizedStruct(ctypes.Structure):
    """Mirrors ``struct Quantized``."""

    _fields_ = [("rows", Matrices)]


class ActivationStruct(ctypes.Structure):
    """Mirrors ``struct Activation``."""

    _fields_ = [
        ("function", ctypes.c_int32),
        ("gated", ctypes.c_int32),
        ("limit_after", ctypes.c_int32),
        ("limit", ctypes.c_float),
        ("alpha", ctypes.c_float),
        ("beta", ctypes.c_float),
    ]


class LayerStruct(ctypes.Structure):
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
        ("bias", Pointers),
        ("bias_stride", Strides),
        ("activation", ActivationStruct),
        ("dtype", ctypes.c_int32),
    ]


STRUCTS = (MatrixStruct, BitmapStruct, LowRankStruct, QuantizedStruct, ActivationStruct, LayerStruct)


class BoundStruct:
    """One layer's ``struct Layer``, with the arrays and tensors it points to.

    Args:
        weights: the layer; contiguous, on the CPU.
        activation: the experts'.
    """

    def __init__(self, weights: ResMoEWeights, activation: Activation) -> None:
        self._weights = weights  # keeps the tensors' memory
        low_rank: list[LowRankStruct] = []
        bitmap: list[BitmapStruct] = []
        quantized: list[QuantizedStruct] = []
        for part in weights.residual:
            if isinstance(part, LowRankWeights):
                low_rank.append(_low_rank(part))
            elif isinstance(part, QuantizedWeights):
                quantized.append(_quantized(part))
            elif isinstance(part, BitmapWeights):
                bitmap.append(_bitmap(part))
            else:
                bitmap.append(_row_bitmap(part))
        self._arrays = (
            (LowRankStruct * len(low_rank))(*low_rank),
            (BitmapStruct * len(bitmap))(*bitmap),
            (QuantizedStruct * len(quantized))(*quantized),
        )
        biases = [weights.biases.get(p) for p in PROJECTIONS]
        self.struct = LayerStruct(
            weights.hidden_size,
            weights.intermediate_size,
            weights.num_experts,
            mask_row_bytes(weights.hidden_size),
            Matrices(*(matrix_struct(weights.center.get(p), shared=True) for p in PROJECTIONS)),
            ctypes.addressof(self._arrays[0]),
            len(low_rank),
            ctypes.addressof(self._arrays[1]),
            len(bitmap),
            ctypes.addressof(self._arrays[2]),
            len(quantized),
            Pointers(*(pointer_to(bias) for bias in biases)),
            Strides(*(0 if bias is None else bias.stride(0) for bias in biases)),
            _activation(activation),
            DTYPES[_dtype(weights)],
        )


def _activation(activation: Activation) -> ActivationStruct:
    return ActivationStruct(
        FUNCTIONS[activation.function],
        activation.gated,
        activation.limit_after,
        math.inf if activation.limit is None else activation.limit,
        activation.alpha,
        activation.beta,
    )


def matrix_struct(rows: Matrix | None, *, shared: bool = False) -> MatrixStruct:
    """``[E, I, columns]``, or, shared by all experts, ``[I, columns]``: stride 0."""
    if rows is None:
        return MatrixStruct()
    if isinstance(rows, Tensor):
        return MatrixStruct(rows.data_ptr(), None, 0 if shared else rows.stride(0), 0, 0, 0, None)
    strides = (0, 0) if shared else (rows.codes.stride(0), rows.scales.stride(0))
    group = _whole_row(rows.columns) if rows.group_size is None else rows.group_size
    tables = trellis_tables(rows.bits).data_ptr() if rows.trellis else None
    return MatrixStruct(rows.codes.data_ptr(), rows.scales.data_ptr(), *strides, rows.bits, group, tables)


@functools.cache
def trellis_tables(bits: int) -> Tensor:
    """Kept for as long as the process: structs point to it."""
    return trellis.tables(bits)


def _whole_row(columns: int) -> int:
    return columns + 8


def _low_rank(part: LowRankWeights) -> LowRankStruct:
    return LowRankStruct(
        matrix_struct(part.u), Matrices(*(matrix_struct(part.v.get(p)) for p in PROJECTIONS)), part.rank
    )


def _quantized(part: QuantizedWeights) -> QuantizedStruct:
    return QuantizedStruct(Matrices(*(matrix_struct(part.rows.get(p)) for p in PROJECTIONS)))


def _bitmap(part: BitmapWeights) -> BitmapStruct:
    values = dict.fromkeys(part.projections, part.values)
    made = _any_bitmap(part, values, part.row_ptr)
    if part.starts is not None:
        made.starts, made.starts_stride = part.starts.data_ptr(), part.starts.stride(0)
        made.values_stride = Strides(0, 0, 0)
    return made


def _row_bitmap(part: RowBitmapWeights) -> BitmapStruct:
    made = _any_bitmap(part, part.values, {})
    made.values_per_row = part.values_per_row
    return made


def _any_bitmap(
    part: BitmapWeights | RowBitmapWeights, values: dict[Projection, Tensor], row_ptr: dict[Projection, Tensor]
) -> BitmapStruct:
    tables = (part.mask, row_ptr, values, part.scales or {})
    mask, rows, kept, scales = ([table.get(p) for p in PROJECTIONS] for table in tables)
    columns = 8 * next(iter(part.mask.values())).shape[-1]
    made = BitmapStruct(bits=part.value_bits or 0, group=part.group_size or _whole_row(columns))
    made.mask, made.row_ptr, made.values, made.scales = (
        Pointers(*map(pointer_to, tensors)) for tensors in (mask, rows, kept, scales)
    )
    made.mask_stride, made.row_ptr_stride, made.values_stride, made.scales_stride = (
        Strides(*(0 if t is None else t.stride(0) for t in tensors)) for tensors in (mask, rows, kept, scales)
    )
    made.readable = Strides(*(0 if t is None else _elements_from(t) for t in kept))
    return made


def _elements_from(tensor: Tensor) -> int:
    """Elements of the tensor's memory from its first one on."""
    return tensor.untyped_storage().nbytes() // tensor.itemsize - int(tensor.storage_offset())


def pointer_to(tensor: Tensor | None) -> int | None:
    """Address of the first element; None, which is a null pointer, for None."""
    return None if tensor is None else tensor.data_ptr()


def _dtype(weights: ResMoEWeights) -> torch.dtype:
    """What weights in the model's dtype are in; any where there are none."""
    matrices: list[Matrix] = [*weights.center.values(), *weights.biases.values()]
    for part in weights.residual:
        if isinstance(part, LowRankWeights):
            matrices.append(part.u)
        elif isinstance(part, BitmapWeights):
            matrices.append(part.values)
        elif isinstance(part, RowBitmapWeights):
            matrices.extend(part.values.values())
    stored = (matrix.dtype for matrix in matrices if isinstance(matrix, Tensor) and matrix.dtype != torch.uint8)
    return next(stored, torch.float32)


def struct_fields() -> list[str]:
    """Every field as ``struct.field offset size``, in the structs' order: what ``resmoe_struct_fields`` gives too."""
    lines = []
    for struct in STRUCTS:
        for name, *_ in struct._fields_:
            field = getattr(struct, name)
            lines.append(f"{struct.__name__.removesuffix('Struct')}.{name} {field.offset} {field.size}")
    return lines
