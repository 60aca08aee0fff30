"""A compressed layer for the Triton kernels: parameters to pointers, sizes by token count (launches.py runs it)."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from compress_tools.errors import KernelUnsupportedError
from compress_tools.format.schema import Projection
from resmoe_vllm.kernels.activation import Activation
from resmoe_vllm.kernels.gpu.block_sizes import HOPPER_SHARED, TokenClass, class_of, invariant_class, token_classes
from resmoe_vllm.kernels.gpu.launches import LayerLaunches, checked
from resmoe_vllm.kernels.gpu.plans import Factors, GroupPlan, LayerPlan, Plan, Weight
from resmoe_vllm.kernels.gpu.tiles import PLAIN, Tile, TileSpec, column_pointers, octets_view, window_levels
from resmoe_vllm.weights.bound import (
    BitmapWeights,
    Coded,
    LowRankWeights,
    Matrix,
    QuantizedWeights,
    ResMoEWeights,
    RowBitmapWeights,
)
from resmoe_vllm.weights.layer_loader import BoundGroup

# by parameter, as long as it lives
_MADE: WeakIdKeyDictionary = WeakIdKeyDictionary()


def plan_layer(groups: Sequence[BoundGroup], *, center_in_tile: bool) -> LayerPlan:
    """Weights to pointers; decoded tiles hold the center or not.

    Raises:
        KernelUnsupportedError: one expert's matrix is too large for 32-bit offsets.
    """
    size_i, size_h = groups[0].weights.intermediate_size, groups[0].weights.hidden_size
    if 3 * size_i * size_h >= 2**31:
        raise KernelUnsupportedError(
            f"resmoe's GPU kernels take experts of up to 2**31 weights, not three of "
            f"[{size_i}, {size_h}]; use tensor parallelism"
        )
    plans = tuple(
        GroupPlan(
            _plan(group.weights, "gate_proj", center_in_tile),
            _plan(group.weights, "up_proj", center_in_tile),
            _plan(group.weights, "down_proj", center_in_tile),
            group.weights.num_experts,
            group.expert_map,
        )
        for group in groups
    )
    return LayerPlan(
        plans,
        size_i,
        size_h,
        _down_bias(groups),
        _map_of([plan for plan in plans if plan.down.center is not None], plans),
        _map_of([plan for plan in plans if plan.down.per_pair], plans),
    )


def _map_of(some: Sequence[GroupPlan], every: Sequence[GroupPlan]) -> Tensor | None:
    """0 for the experts of some groups, -1 for all others; None where those are all, or none."""
    maps = [group.expert_map for group in some if group.expert_map is not None]
    if len(some) == len(every) or not maps:
        return None
    return torch.stack(maps).amax(0).clamp(max=0)


def _down_bias(groups: Sequence[BoundGroup]) -> Tensor | None:
    """``[E, H]``; of several groups by global expert, zeros where it is not here."""
    biases = [group.weights.biases.get("down_proj") for group in groups]
    if len(groups) == 1 or biases[0] is None:
        return biases[0]
    total: Tensor | None = None
    for group, bias in zip(groups, biases, strict=True):
        if bias is not None and group.expert_map is not None:
            here = torch.where((group.expert_map >= 0)[:, None], bias[group.expert_map.clamp(min=0).long()], 0)
            total = here if total is None else total + here
    return total


def _plan(weights: ResMoEWeights, projection: Projection, center_in_tile: bool) -> Plan:
    center = weights.center.get(projection)
    parts = [part for part in weights.residual if not isinstance(part, LowRankWeights)]
    factors = None
    for number, part in enumerate(weights.residual):
        if isinstance(part, LowRankWeights) and projection in part.projections:
            columns, u = _whole_rows(part.u)
            factors = Factors(rows_tile(u), rows_tile(part.v[projection]), part.rank, columns, number)
    tile = sum_tile(None, parts, projection)
    bias = None if projection == "down_proj" else weights.biases.get(projection)
    if tile is not None and center_in_tile:
        return Plan(None, sum_tile(center, parts, projection), factors, bias)
    return Plan(sum_tile(center, [], projection), tile, factors, bias)


def _whole_rows(u: Matrix) -> tuple[int, Matrix]:
    """U's columns in memory, and U with all of them: behind a rank of plain values there may be zeros."""
    if isinstance(u, Coded):
        return u.shape[-1], u
    columns = u.stride(-2)
    return columns, u.as_strided((*u.shape[:-1], columns), u.stride(), u.storage_offset())


class GpuKernel:
    """One layer bound to pointers, once with and once without the center in decoded tiles.

    Args:
        groups: those of the layer's experts, in one dtype or codes, all on one GPU.
        activation: the experts'.
        batch_invariant: a token's bits must not depend on its batch.
    """

    def __init__(self, groups: Sequence[BoundGroup], activation: Activation, *, batch_invariant: bool = False) -> None:
        self._activation, self._batch_invariant = activation, batch_invariant
        self.coders = frozenset[str]().union(*(group.weights.coders for group in groups))
        self.plans = {inside: plan_layer(groups, center_in_tile=inside) for inside in (False, True)}
        self._classes: dict[tuple[int, int, torch.dtype], tuple[tuple[TokenClass, ...], list[LayerLaunches]]] = {}

    def __call__(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None = None) -> Tensor:
        """See ``fused_moe_ref``; products in x's dtype, sums in fp32."""
        x, topk_weights, topk_ids = checked(x, topk_weights, topk_ids, self.plans[False], self._activation)
        classes, launches = self._launches(topk_ids.shape[1], x, expert_map)
        return launches[class_of(classes, len(x))](x, topk_weights, topk_ids, expert_map)

    def warm_up(self, top_k: int, dtype: torch.dtype, device: torch.device, expert_map: Tensor | None) -> None:
        """Compile, and keep, all that any number of tokens will launch: one token in each class."""
        x = torch.zeros(1, self.plans[False].hidden, dtype=dtype, device=device)
        weights = torch.zeros(1, top_k, device=device)
        ids = torch.arange(top_k, dtype=torch.int32, device=device)[None]
        for launches in self._launches(top_k, x, expert_map)[1]:
            launches(x, weights, ids, expert_map)

    def _launches(
        self, top_k: int, x: Tensor, expert_map: Tensor | None
    ) -> tuple[tuple[TokenClass, ...], list[LayerLaunches]]:
        """Classes of T and the launches of each."""
        plan = self.plans[False]
        own_map = plan.groups[0].expert_map if expert_map is None else expert_map
        experts = plan.experts if own_map is None else len(own_map)
        key = top_k, experts, x.dtype
        if key not in self._classes:
            if self._batch_invariant:
                classes: tuple[TokenClass, ...] = (invariant_class(self.coders, x.dtype, shared_memory(x.device)),)
            else:
                sizes = plan.hidden, plan.intermediate, device_name(x.device)
                classes = token_classes(top_k, experts, *sizes, x.dtype, self.coders, shared_memory(x.device))
            share = plan.experts / experts
            self._classes[key] = (
                classes,
                [LayerLaunches(self.plans[one.config.center_in_tile], self._activation, one, share) for one in classes],
            )
        return self._classes[key]


@cache
def device_name(device: torch.device) -> str:
    """As vLLM's files of tuned sizes have it, with spaces; ``cpu`` in Triton's interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a block may use; in Triton's interpreter as many as an H100's."""
    if device.type != "cuda":
        return HOPPER_SHARED
    properties = torch.cuda.get_device_properties(device)
    # ROCm's builds of torch say the first alone.
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def rows_tile(own: Matrix) -> Weight:
    """One matrix for each expert: ``[E, rows, columns]``."""
    pointer, scales, levels, bits, group = _matrix(own)
    return (
        Tile(
            own=pointer,
            own_scales=scales,
            own_levels=levels,
            own_stride=pointer.stride(0),
            own_scales_stride=_stride(scales),
        ),
        TileSpec(own_bits=bits, own_group=group),
    )


def _made_once(source: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """What is made of a parameter, once for all plans of its layer."""
    found: Tensor | None = _MADE.get(source)
    if found is None:
        found = make(source)
        _MADE[source] = found
    return found


def _by_group(scales: Tensor) -> Tensor:
    """``[E, rows, groups]`` to ``[E, groups, rows]``, contiguous."""
    return scales.mT.contiguous()


def sum_tile(
    center: Matrix | None, parts: list[QuantizedWeights | BitmapWeights | RowBitmapWeights], projection: Projection
) -> Weight | None:
    """Center and the parts that cover the projection; None where there is no term."""
    tile, spec = Tile(), TileSpec()
    if center is not None:
        pointer, scales, levels, bits, group = _matrix(center)
        tile = tile._replace(center=pointer, center_scales=scales, center_levels=levels)
        spec = spec._replace(center_bits=bits, center_group=group)
    for part in parts:
        if projection not in part.projections:
            continue
        if isinstance(part, QuantizedWeights):
            if spec.own_bits:
                raise KernelUnsupportedError(f"resmoe's GPU kernels read one part of codes, {projection} has two")
            own, own_spec = rows_tile(part.rows[projection])
            if projection == "down_proj" and own.own_scales is not None and own_spec.own_group:
                # A product over rows reads one group of many rows, each of which would be a line of memory.
                scales = _made_once(own.own_scales, _by_group)
                own = own._replace(own_scales=scales, own_scales_stride=scales.stride(0))
                own_spec = own_spec._replace(own_by_group=True)
            tile = tile._replace(**{name: getattr(own, name) for name in Tile._fields if name.startswith("own")})
            spec = spec._replace(
                **{name: getattr(own_spec, name) for name in TileSpec._fields if name.startswith("own")}
            )
        else:
            tile, spec = _add_bitmap(tile, spec, part, projection)
    return None if spec == TileSpec() else (tile, spec)


def _add_bitmap(tile: Tile, spec: TileSpec, part: BitmapWeights | RowBitmapWeights, projection: Projection) -> Weight:
    mask = part.mask[projection]
    pointers = None if projection != "down_proj" else _made_once(mask, column_pointers)
    row_ptr = starts = None
    row_stride = 0
    if isinstance(part, RowBitmapWeights):
        values = part.values[projection]
        row_stride = values.shape[-1] * 8 // (part.value_bits or 8)
    else:
        values, row_ptr, starts = part.values, part.row_ptr[projection], part.starts
    scales = None if part.scales is None else part.scales[projection]
    tile = tile._replace(
        mask=mask,
        pointers=pointers,
        row_ptr=row_ptr,
        kept_values=values,
        starts=starts,
        value_scales=scales,
        row_stride=row_stride,
        mask_stride=mask.stride(0),
        pointers_stride=_stride(pointers),
        row_ptr_stride=_stride(row_ptr),
        values_stride=0 if starts is not None else values.stride(0),
        starts_stride=_stride(starts),
        value_scales_stride=_stride(scales),
    )
    spec = spec._replace(
        value_bits=part.value_bits or PLAIN,
        value_group=part.group_size or 0,
        by_row=row_stride > 0,
    )
    return tile, spec


def _matrix(matrix: Matrix) -> tuple[Tensor, Tensor | None, Tensor | None, int, int]:
    """What a tile takes: values or codes, scales, a trellis's levels, bits, columns of a group."""
    if not isinstance(matrix, Coded):
        return matrix, None, None, PLAIN, 0
    levels = window_levels(matrix.bits, matrix.codes.device) if matrix.trellis else None
    return octets_view(matrix.codes, matrix.bits), matrix.scales, levels, matrix.bits, matrix.group_size or 0


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)
