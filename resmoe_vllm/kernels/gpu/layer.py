"""A compressed layer for the Triton kernels: parameters to pointers, sizes by token count (launches.py runs it)."""

from functools import cache

import torch
from torch import Tensor

from compress_tools.errors import KernelUnsupportedError
from compress_tools.format.schema import Projection
from resmoe_vllm.kernels.activation import Activation
from resmoe_vllm.kernels.gpu.block_sizes import pick_config
from resmoe_vllm.kernels.gpu.launches import Factors, LayerPlan, Plan, Weight, run_plan
from resmoe_vllm.kernels.gpu.tiles import PLAIN, Tile, TileSpec, octets_view, window_levels
from resmoe_vllm.weights.bound import (
    BitmapWeights,
    Coded,
    LowRankWeights,
    Matrix,
    QuantizedWeights,
    ResMoEWeights,
    RowBitmapWeights,
)


def plan_layer(weights: ResMoEWeights, restore: bool) -> LayerPlan:
    """Weights to pointers; with ``restore``, decoded tiles hold the center.

    Raises:
        KernelUnsupportedError: one expert's matrix is too large for 32-bit offsets.
    """
    if 3 * weights.intermediate_size * weights.hidden_size >= 2**31:
        raise KernelUnsupportedError(
            f"resmoe's GPU kernels take experts of up to 2**31 weights, not three of "
            f"[{weights.intermediate_size}, {weights.hidden_size}]; use tensor parallelism"
        )
    return LayerPlan(
        _plan(weights, "gate_proj", restore),
        _plan(weights, "up_proj", restore),
        _plan(weights, "down_proj", restore),
        weights.num_experts,
        weights.intermediate_size,
        weights.hidden_size,
    )


def _plan(weights: ResMoEWeights, projection: Projection, restore: bool) -> Plan:
    center = weights.center.get(projection)
    parts = [part for part in weights.residual if not isinstance(part, LowRankWeights)]
    factors = None
    for number, part in enumerate(weights.residual):
        if isinstance(part, LowRankWeights) and projection in part.projections:
            factors = Factors(rows_tile(part.u), rows_tile(part.v[projection]), part.rank, number)
    tile = sum_tile(None, parts, projection)
    bias = weights.biases.get(projection)
    if tile is not None and restore:
        return Plan(None, sum_tile(center, parts, projection), factors, bias)
    return Plan(sum_tile(center, [], projection), tile, factors, bias)


class GpuKernel:
    """One layer, or group of experts, bound to pointers, once with and once without the center in decoded tiles.

    Args:
        weights: in one dtype or codes, all on one GPU.
        activation: the experts'.
    """

    def __init__(self, weights: ResMoEWeights, activation: Activation) -> None:
        self._weights, self._activation = weights, activation
        self._plans = {restore: plan_layer(weights, restore) for restore in (False, True)}

    def __call__(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None = None) -> Tensor:
        """See ``fused_moe_ref``; products in x's dtype, sums in fp32."""
        weights = self._weights
        config = pick_config(
            len(x),
            topk_ids.shape[1],
            weights.num_experts,
            weights.hidden_size,
            weights.intermediate_size,
            device_name(x.device),
            x.dtype,
            weights.coders,
        )
        plan = self._plans[config.restore]
        return run_plan(x, topk_weights, topk_ids, plan, self._activation, expert_map, config)


@cache
def device_name(device: torch.device) -> str:
    """As vLLM's files of tuned sizes have it, with spaces; ``cpu`` in Triton's interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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
            tile = tile._replace(**{name: getattr(own, name) for name in Tile._fields if name.startswith("own")})
            spec = spec._replace(own_bits=own_spec.own_bits, own_group=own_spec.own_group)
        else:
            tile, spec = _add_bitmap(tile, spec, part, projection)
    return None if spec == TileSpec() else (tile, spec)


def _add_bitmap(tile: Tile, spec: TileSpec, part: BitmapWeights | RowBitmapWeights, projection: Projection) -> Weight:
    mask = part.mask[projection]
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
        words=mask.view(torch.int32),
        row_ptr=row_ptr,
        kept_values=values,
        starts=starts,
        value_scales=scales,
        mask_stride=mask.stride(0),
        row_ptr_stride=_stride(row_ptr),
        values_stride=0 if starts is not None else values.stride(0),
        starts_stride=_stride(starts),
        value_scales_stride=_stride(scales),
    )
    spec = spec._replace(
        value_bits=part.value_bits or PLAIN,
        value_group=part.group_size or 0,
        row_stride=row_stride,
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
