"""Where each stored tensor lies in vLLM's parameters, and the struct of tensors that a kernel gets.

A parameter ``w13_<suffix>`` (gate and up) or ``w2_<suffix>`` (down) is one matrix ``[rows, columns]``: a row
per expert (one row for what a layer shares), in it one slot per projection or group, in the order of the
layer's spec. So any grouping of projections and any pair of ranks stacks without padding, and an expert's
bytes are contiguous. With one joint low-rank group, for example, ``w13_resmoe_u`` is ``[E, I*R]``,
``w13_resmoe_v`` ``[E, 2*R*H]`` and ``w2_resmoe_v`` ``[E, R*H]``; a slot's view has the shape that the format
gives one expert's tensor, ``[E, R, H]``.

Two tensors exist in memory only: ``resmoe_row_ptr`` (int32 ``[E, I]`` per bitmap projection: position of a
row's first value, counted from the expert's first value in its group) and, when tensor parallelism leaves
each expert a different number of values, ``resmoe_value_starts`` (int64 ``[E]`` per bitmap group) into the
packed values ``[N]``.
"""

import json
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod

from torch import Tensor

from compress_tools.format.schema import BitmapResidual, LayerSpec, Projection, ResMoEFormat
from compress_tools.format.tensors import (
    CENTER,
    MASK,
    VALUES,
    TensorSpec,
    U,
    V,
    expert_tensors,
    shared_tensors,
)

ROW_PTR = "resmoe_row_ptr"
STARTS = "resmoe_value_starts"

PARAM_PREFIX: dict[Projection, str] = {"gate_proj": "w13", "up_proj": "w13", "down_proj": "w2"}
PROJECTION_OF_SHARD: dict[str, Projection] = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

Key = tuple[Projection, str]


@dataclass(frozen=True)
class LowRankWeights:
    """``U @ V`` residuals of one group.

    Attributes:
        projections: the group.
        u: ``[E, I, R]``.
        v: ``[E, R, H]`` for each projection.
    """

    projections: tuple[Projection, ...]
    u: Tensor
    v: dict[Projection, Tensor]


@dataclass(frozen=True)
class BitmapWeights:
    """Pruned residuals of one group.

    Attributes:
        projections: the group.
        mask: uint8 ``[E, I, mask_row_bytes(H)]`` for each projection.
        row_ptr: int32 ``[E, I]`` for each projection, into the expert's values.
        values: ``[E, values_per_expert]``, or packed ``[N]`` when ``starts`` is given.
        starts: int64 ``[E]``, first value of each expert in packed values; else None.
    """

    projections: tuple[Projection, ...]
    mask: dict[Projection, Tensor]
    row_ptr: dict[Projection, Tensor]
    values: Tensor
    starts: Tensor | None

    def expert_values(self, expert: int) -> Tensor:
        """Values of one expert, in the order of ``projections``; packed, other experts' values follow."""
        return self.values[expert] if self.starts is None else self.values[int(self.starts[expert]) :]


@dataclass(frozen=True)
class ResMoEWeights:
    """One layer on one rank, E local experts and I local rows: what a kernel gets beside x and topk.

    Attributes:
        hidden_size: H.
        intermediate_size: I on this rank.
        center: ``[I, H]`` for each projection that has a center; ``down_proj`` transposed, as everywhere.
        residual: parts, to be added up.
    """

    hidden_size: int
    intermediate_size: int
    center: dict[Projection, Tensor]
    residual: tuple[LowRankWeights | BitmapWeights, ...]


@dataclass(frozen=True)
class Slot:
    """One tensor's columns in every row of a parameter.

    Attributes:
        param: parameter name.
        start: first column.
        shape: shape of one row's tensor on this rank.
        dtype: its dtype's name.
        shared: the parameter has one row, not one per expert.
    """

    param: str
    start: int
    shape: tuple[int, ...]
    dtype: str
    shared: bool

    def view(self, param: Tensor) -> Tensor:
        """``[rows, columns]`` to ``[rows, *shape]``, without a copy."""
        return param[:, self.start : self.start + prod(self.shape)].unflatten(1, self.shape)


@dataclass(frozen=True)
class LayerLayout:
    """Slots of one layer on one rank.

    Attributes:
        key: text that ``parse_layout`` makes this layout of; what the custom op is given.
        hidden_size: H.
        intermediate_size: I on this rank.
        spec: the layer's spec.
        slots: by (projection, suffix).
        packed: bitmap values are packed, because tensor parallelism slices them.
    """

    key: str
    hidden_size: int
    intermediate_size: int
    spec: LayerSpec
    slots: dict[Key, Slot]
    packed: bool

    @cached_property
    def params(self) -> dict[str, tuple[int, str, bool]]:
        """(columns, dtype, shared) by parameter name, in the order that ``bind`` takes them."""
        params: dict[str, tuple[int, str, bool]] = {}
        for slot in self.slots.values():
            columns = params[slot.param][0] if slot.param in params else 0
            params[slot.param] = (columns + prod(slot.shape), slot.dtype, slot.shared)
        return params

    @cached_property
    def method(self) -> str:
        """Residual methods, the kernel table's key: "bitmap", "low_rank" or "bitmap+low_rank"."""
        return "+".join(sorted({part.method for part in self.spec.residual}))

    def bind(self, tensors: list[Tensor]) -> ResMoEWeights:
        """Views of the parameters, given in the order of ``params``."""
        by_name = dict(zip(self.params, tensors, strict=True))

        def view(projection: Projection, suffix: str) -> Tensor:
            slot = self.slots[projection, suffix]
            return slot.view(by_name[slot.param])

        def bind_bitmap(part: BitmapResidual) -> BitmapWeights:
            first = part.projections[0]
            return BitmapWeights(
                part.projections,
                mask={projection: view(projection, MASK) for projection in part.projections},
                row_ptr={projection: view(projection, ROW_PTR) for projection in part.projections},
                values=by_name[self.slots[first, VALUES].param] if self.packed else view(first, VALUES),
                starts=view(first, STARTS)[:, 0] if self.packed else None,
            )

        return ResMoEWeights(
            self.hidden_size,
            self.intermediate_size,
            center={p: view(p, CENTER)[0] for part in self.spec.center for p in part.projections},
            residual=tuple(
                bind_bitmap(part)
                if part.method == "bitmap"
                else LowRankWeights(
                    part.projections, view(part.projections[0], U), {p: view(p, V) for p in part.projections}
                )
                for part in self.spec.residual
            ),
        )


def layout_key(fmt: ResMoEFormat, index: int, tp_size: int) -> str:
    """Text that holds all of a layer's layout on one rank; equal for equal layouts."""
    return json.dumps(
        {
            "dtype": fmt.dtype,
            "hidden_size": fmt.hidden_size,
            "intermediate_size": fmt.intermediate_size // tp_size,
            "packed": tp_size > 1,
            "layer": fmt.layers[index].model_dump(),
        }
    )


@cache
def parse_layout(key: str) -> LayerLayout:
    """Layout of a key; cached, for the custom op asks on every call."""
    fields = json.loads(key)
    spec = LayerSpec.model_validate(fields["layer"])
    packed = fields["packed"]
    # not validated: a rank may exceed the rows that tensor parallelism leaves
    local = ResMoEFormat.model_construct(
        dtype=fields["dtype"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
    )
    slots: dict[Key, Slot] = {}
    ends: dict[str, int] = {}

    def add(projection: Projection, suffix: str, shape: tuple[int, ...], dtype: str, shared: bool) -> None:
        param = f"{PARAM_PREFIX[projection]}_{suffix}"
        slots[projection, suffix] = Slot(param, ends.get(param, 0), shape, dtype, shared)
        ends[param] = ends.get(param, 0) + prod(shape)

    def add_stored(tensor: TensorSpec) -> None:
        shape = (0,) if packed and tensor.suffix == VALUES else tensor.shape
        add(tensor.projection, tensor.suffix, shape, tensor.dtype, tensor.expert is None)

    for tensor in shared_tensors(local, spec):
        add_stored(tensor)
    for tensor in expert_tensors(local, spec, 0):
        add_stored(tensor)
        if tensor.suffix == MASK:
            add(tensor.projection, ROW_PTR, (local.intermediate_size,), "int32", shared=False)
        if tensor.suffix == VALUES and packed:
            add(tensor.projection, STARTS, (1,), "int64", shared=False)
    return LayerLayout(key, local.hidden_size, local.intermediate_size, spec, slots, packed)
