"""Where each stored tensor lies in vLLM's parameters: slots, and how a kernel's structs are bound to them.

A parameter ``w13_<suffix>`` (gate and up) or ``w2_<suffix>`` (down) is one matrix ``[rows, columns]``: a row
per expert (one row for what a layer shares), in it one slot per projection or group, in the order of the
layer's spec. So any grouping of projections and any pair of ranks stacks without padding, and an expert's
bytes are contiguous. With one joint low-rank group, for example, ``w13_resmoe_u`` is ``[E, I*R]``,
``w13_resmoe_v`` ``[E, 2*R*H]`` and ``w2_resmoe_v`` ``[E, R*H]``; a slot's view has the shape that the format
gives one expert's tensor, ``[E, R, H]``.

Two tensors exist in memory only: ``resmoe_row_ptr`` (int32 ``[E, I]`` per bitmap projection: position of a
row's first value, counted from the expert's first value in its group) and, when tensor parallelism leaves
each expert a different number of values, ``resmoe_value_starts`` (int64 ``[E]`` per bitmap group) into the
packed values ``[N]`` or bytes of codes.

A layer whose experts are coded in groups has a layout for each group; E is then the group's experts.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from compress_tools.format.parts.base import CodedRows, TensorSpec
from compress_tools.format.parts.bitmap import MASK, ROW_VALUE_CODES, ROW_VALUES, VALUE_CODES, VALUE_SCALES, VALUES
from compress_tools.format.parts.dense import CENTER
from compress_tools.format.parts.low_rank import CODED_U, CODED_V, U, V
from compress_tools.format.parts.trellis import TrellisRows
from compress_tools.format.schema import (
    BitmapResidual,
    CenterPart,
    DenseCenter,
    LayerSpec,
    LowRankResidual,
    Projection,
    QuantizedCenter,
    QuantizedResidual,
    ResidualPart,
    ResMoEFormat,
    RowBitmapResidual,
    TrellisCenter,
    TrellisResidual,
)
from compress_tools.format.tensors import BIAS, expert_tensors, shared_tensors
from resmoe_vllm.weights.alignment import RANK_MULTIPLE
from resmoe_vllm.weights.bound import (
    BitmapWeights,
    Coded,
    LowRankWeights,
    Matrix,
    QuantizedWeights,
    ResidualWeights,
    ResMoEWeights,
    RowBitmapWeights,
)

ROW_PTR = "resmoe_row_ptr"
STARTS = "resmoe_value_starts"
# What GPUs load at once: codes are read as integers of up to 8 bytes, plain values 16 bytes at a time.
SLOT_BYTES = 16
# one run of values for a whole group, which tensor parallelism can't slice without the masks
STREAMS = (VALUES, VALUE_CODES)

PARAM_PREFIX: dict[Projection, str] = {"gate_proj": "w13", "up_proj": "w13", "down_proj": "w2"}
# What vLLM's loaders call an expert's tensors; of experts without a gate, up is the first.
PROJECTION_OF_SHARD: dict[str, Projection] = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
UNGATED_PROJECTION_OF_SHARD: dict[str, Projection] = {"w1": "up_proj", "w2": "down_proj"}

Key = tuple[Projection, str]


def projection_of_shard(fmt: ResMoEFormat) -> dict[str, Projection]:
    """Projection by vLLM's ``shard_id``."""
    return PROJECTION_OF_SHARD if fmt.gated else UNGATED_PROJECTION_OF_SHARD


@dataclass(frozen=True)
class Slot:
    """One tensor's columns in every row of a parameter.

    Attributes:
        param: parameter name.
        start: first column.
        shape: shape of one row's tensor on this rank.
        dtype: its dtype's name.
        shared: the parameter has one row, not one per expert.
        padding: zeros in memory behind each row of the tensor.
    """

    param: str
    start: int
    shape: tuple[int, ...]
    dtype: str
    shared: bool
    padding: int = 0

    @property
    def end(self) -> int:
        """Behind its last column."""
        return self.start + prod(self._in_memory)

    @property
    def _in_memory(self) -> tuple[int, ...]:
        return (*self.shape[:-1], self.shape[-1] + self.padding)

    def view(self, param: Tensor) -> Tensor:
        """``[rows, columns]`` to ``[rows, *shape]``, without a copy."""
        return self._whole(param)[..., : self.shape[-1]]

    def put(self, param: Tensor, row: int, tensor: Tensor) -> Tensor:
        """Copy one row's tensor to its place, which is returned, and zeros behind its rows."""
        held = self.view(param)[row]
        held.copy_(tensor)
        if self.padding:
            self._whole(param)[row][..., self.shape[-1] :] = 0
        return held

    def _whole(self, param: Tensor) -> Tensor:
        whole: Tensor = param[:, self.start : self.end].unflatten(1, self._in_memory)
        return whole


@dataclass(frozen=True)
class LayerLayout:
    """Slots of one layer on one rank.

    Attributes:
        hidden_size: H.
        intermediate_size: I on this rank.
        spec: the layer's spec.
        slots: by (projection, suffix).
        packed: unstructured bitmap values are packed, because tensor parallelism slices them.
        padded: for the GPU: slots and rows of parameters begin at multiples of ``SLOT_BYTES``, U's rows at multiples
            of ``RANK_MULTIPLE``.
    """

    hidden_size: int
    intermediate_size: int
    spec: LayerSpec
    slots: dict[Key, Slot]
    packed: bool
    padded: bool = False

    @cached_property
    def params(self) -> dict[str, tuple[int, str, bool]]:
        """(columns, dtype, shared) by parameter name, in the order that ``bind`` takes them."""
        params: dict[str, tuple[int, str, bool]] = {}
        for slot in self.slots.values():
            columns = _aligned(slot.end, slot.dtype) if self.padded else slot.end
            params[slot.param] = (columns, slot.dtype, slot.shared)
        return params

    @cached_property
    def coders(self) -> frozenset[str]:
        """What a kernel must read: its parts' ``kernel_coder``."""
        names = (part.kernel_coder for part in (*self.spec.center, *self.spec.residual))
        return frozenset(name for name in names if name is not None)

    def bind(self, tensors: list[Tensor]) -> ResMoEWeights:
        """Views of the parameters, given in the order of ``params``."""
        binder = _Binder(self, dict(zip(self.params, tensors, strict=True)))
        return ResMoEWeights(
            self.hidden_size,
            self.intermediate_size,
            center={
                projection: binder.center(part, projection)
                for part in self.spec.center
                for projection in part.projections
            },
            residual=tuple(map(binder.part, self.spec.residual)),
            coders=self.coders,
            biases={projection: binder.view(projection, suffix) for projection, suffix in self.slots if suffix == BIAS},
        )


@dataclass(frozen=True)
class _Binder:
    layout: LayerLayout
    tensors: dict[str, Tensor]

    def view(self, projection: Projection, suffix: str) -> Tensor:
        slot = self.layout.slots[projection, suffix]
        return slot.view(self.tensors[slot.param])

    def coded(
        self, projection: Projection, rows: CodedRows, columns: int, bits: int, group_size: int | None = None
    ) -> Coded:
        codes, scales = self.view(projection, rows.codes), self.view(projection, rows.scales)
        return Coded(codes, scales, bits, columns, group_size, isinstance(rows, TrellisRows))

    def center(self, part: CenterPart, projection: Projection) -> Matrix:
        match part:
            case DenseCenter():
                return self.view(projection, CENTER)[0]
            case QuantizedCenter() | TrellisCenter():
                return self.coded(projection, part.stored_as, self.layout.hidden_size, part.bits, part.group_size)[0]

    def part(self, part: ResidualPart) -> ResidualWeights:
        match part:
            case QuantizedResidual() | TrellisResidual():
                return self._quantized(part)
            case LowRankResidual():
                return self._low_rank(part)
            case BitmapResidual():
                return self._bitmap(part)
            case RowBitmapResidual():
                return self._row_bitmap(part)

    def _quantized(self, part: QuantizedResidual | TrellisResidual) -> QuantizedWeights:
        hidden_size = self.layout.hidden_size
        rows = {p: self.coded(p, part.stored_as, hidden_size, part.bits, part.group_size) for p in part.projections}
        return QuantizedWeights(part.projections, rows)

    def _low_rank(self, part: LowRankResidual) -> LowRankWeights:
        first, projections, bits = part.projections[0], part.projections, part.factor_bits
        if bits is None:
            return LowRankWeights(projections, self.view(first, U), {p: self.view(p, V) for p in projections})
        v: dict[Projection, Matrix] = {p: self.coded(p, CODED_V, self.layout.hidden_size, bits) for p in projections}
        return LowRankWeights(projections, self.coded(first, CODED_U, part.rank, bits), v)

    def _bitmap(self, part: BitmapResidual) -> BitmapWeights:
        first, packed = part.projections[0], self.layout.packed
        slot = self.layout.slots[first, part.stream]
        return BitmapWeights(
            part.projections,
            mask={p: self.view(p, MASK) for p in part.projections},
            row_ptr={p: self.view(p, ROW_PTR) for p in part.projections},
            values=self.tensors[slot.param] if packed else self.view(first, part.stream),
            starts=self.view(first, STARTS)[:, 0] if packed else None,
            value_bits=part.value_bits,
            scales=self._value_scales(part),
            group_size=part.group_size,
        )

    def _row_bitmap(self, part: RowBitmapResidual) -> RowBitmapWeights:
        suffix = ROW_VALUES if part.value_bits is None else ROW_VALUE_CODES
        return RowBitmapWeights(
            part.projections,
            mask={p: self.view(p, MASK) for p in part.projections},
            values={p: self.view(p, suffix) for p in part.projections},
            values_per_row=part.values_per_row,
            value_bits=part.value_bits,
            scales=self._value_scales(part),
            group_size=part.group_size,
        )

    def _value_scales(self, part: BitmapResidual | RowBitmapResidual) -> dict[Projection, Tensor] | None:
        return None if part.value_bits is None else {p: self.view(p, VALUE_SCALES) for p in part.projections}


def _aligned(columns: int, dtype: str) -> int:
    kind: torch.dtype = getattr(torch, dtype)
    multiple = SLOT_BYTES // kind.itemsize
    return -(-columns // multiple) * multiple


def make_layout(fmt: ResMoEFormat, spec: LayerSpec, tp_size: int, *, padded: bool = False) -> LayerLayout:
    """Layout of one layer, or of one group of its experts, on one rank.

    Args:
        fmt: the checkpoint's format block.
        spec: the layer's, without groups: ``LayerSpec.of_group``.
        tp_size: ranks that share the rows of every expert.
        padded: see ``LayerLayout``.
    """
    packed = tp_size > 1
    # not validated: a rank may exceed the rows that tensor parallelism leaves
    local = ResMoEFormat.model_construct(
        dtype=fmt.dtype,
        hidden_size=fmt.hidden_size,
        intermediate_size=fmt.intermediate_size // tp_size,
        biases=fmt.biases,
        names=fmt.names,
    )
    slots: dict[Key, Slot] = {}
    ends: dict[str, int] = {}

    def add(projection: Projection, suffix: str, shape: tuple[int, ...], dtype: str, *, shared: bool) -> None:
        param = f"{PARAM_PREFIX[projection]}_{suffix}"
        padding = -shape[-1] % RANK_MULTIPLE if padded and suffix == U else 0
        start = _aligned(ends.get(param, 0), dtype) if padded else ends.get(param, 0)
        slots[projection, suffix] = Slot(param, start, shape, dtype, shared, padding)
        ends[param] = slots[projection, suffix].end

    def add_stored(tensor: TensorSpec) -> None:
        shape = (0,) if packed and tensor.suffix in STREAMS else tensor.shape
        add(tensor.projection, tensor.suffix, shape, tensor.dtype, shared=tensor.expert is None)

    unordered = {p for part in spec.residual if part.row_pointers for p in part.projections}
    for tensor in shared_tensors(local, spec):
        add_stored(tensor)
    for tensor in expert_tensors(local, spec, 0):
        add_stored(tensor)
        if tensor.suffix == MASK and tensor.projection in unordered:
            add(tensor.projection, ROW_PTR, (local.intermediate_size,), "int32", shared=False)
        if tensor.suffix in STREAMS and packed:
            add(tensor.projection, STARTS, (1,), "int64", shared=False)
    return LayerLayout(local.hidden_size, local.intermediate_size, spec, slots, packed, padded)
