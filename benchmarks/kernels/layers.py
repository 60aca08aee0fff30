"""Random layers as the kernels take them, made on the device; small ones with the dense truth beside them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.harness.shapes import MoEShape
from compress_tools.residuals.budget import affordable_rank
from resmoe_vllm.kernels.activation import SILU
from resmoe_vllm.kernels.gpu.plans import Factors, GroupPlan, LayerPlan, Plan, Weight
from resmoe_vllm.kernels.gpu.tiles import PLAIN, Tile, TileSpec, column_pointers, octets_view
from resmoe_vllm.weights.alignment import RANK_MULTIPLE

RETAIN_RATIO = 0.25
PROJECTIONS = ("gate", "up", "down")
# columns that share a scale
GROUP = 64


@dataclass
class Layer:
    """One layer.

    Attributes:
        centers: by projection; empty for dense layers.
        tiles: by projection.
        factors: by projection.
        shared_bytes: read once, whatever the routing.
        expert_bytes: read for each expert that is hit.
        truth: fp32 ``[E, I, H]`` by projection, if asked for.
    """

    shape: MoEShape
    centers: dict[str, Weight] = field(default_factory=dict)
    tiles: dict[str, Weight] = field(default_factory=dict)
    factors: dict[str, Factors] = field(default_factory=dict)
    shared_bytes: int = 0
    expert_bytes: int = 0
    truth: dict[str, Tensor] = field(default_factory=dict)

    def plan(self, *, center_in_tile: bool) -> LayerPlan:
        """As ``gpu.layer.plan_layer`` makes it: decoded tiles hold the center or not."""
        plans = []
        for name in PROJECTIONS:
            center, tile = self.centers.get(name), self.tiles.get(name)
            if center_in_tile and center is not None and tile is not None:
                tile = tile[0]._replace(center=center[0].center), tile[1]._replace(center_bits=PLAIN)
                center = None
            plans.append(Plan(center, tile, self.factors.get(name)))
        return LayerPlan([GroupPlan(*plans, self.shape.experts)], self.shape.intermediate, self.shape.hidden)


class Maker:
    """Makes one layer; ``keep_truth`` for small ones only."""

    def __init__(self, shape: MoEShape, device: str, dtype: torch.dtype, seed: int, *, keep_truth: bool) -> None:
        self.layer, self.device, self.dtype, self.keep_truth = Layer(shape), device, dtype, keep_truth
        self.generator = torch.Generator(device).manual_seed(seed)
        self.matrix = shape.experts, shape.intermediate, shape.hidden
        self.scale = shape.hidden**-0.5

    def normal(self, *shape: int, scale: float) -> Tensor:
        """Random values in the layer's dtype."""
        values = torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)
        return values.mul_(scale)

    def add_truth(self, name: str, values: Tensor) -> None:
        """Add up what a projection restores to."""
        if self.keep_truth:
            self.layer.truth[name] = self.layer.truth.get(name, 0) + values.float()

    def center(self) -> None:
        """A center in the layer's dtype for each projection."""
        for name in PROJECTIONS:
            rows = self.normal(*self.matrix[1:], scale=self.scale)
            self.layer.centers[name] = Tile(center=rows), TileSpec(center_bits=PLAIN)
            self.layer.shared_bytes += rows.nbytes
            self.add_truth(name, rows.expand(self.matrix))

    def dense(self) -> Layer:
        """Every expert on its own, in the layer's dtype."""
        for name in PROJECTIONS:
            rows = self.normal(*self.matrix, scale=self.scale)
            self.layer.tiles[name] = Tile(own=rows, own_stride=rows.stride(0)), TileSpec(own_bits=PLAIN)
            self.layer.expert_bytes += rows[0].nbytes
            self.add_truth(name, rows)
        return self.layer

    def low_rank(self) -> Layer:
        """Joint factors at 25 % of the parameters: one U for the three projections."""
        self.center()
        experts, size_i, size_h = self.matrix
        rank = affordable_rank(size_i, 3 * size_h, RETAIN_RATIO)
        # rows of U are padded with zeros, as the loader has it
        columns = -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE
        u = self.normal(experts, size_i, columns, scale=self.scale)
        u[..., rank:] = 0
        self.layer.expert_bytes = u[0].nbytes
        u_weight = Tile(own=u, own_stride=u.stride(0)), TileSpec(own_bits=PLAIN)
        for name in PROJECTIONS:
            v = self.normal(experts, rank, size_h, scale=rank**-0.5)
            v_weight = Tile(own=v, own_stride=v.stride(0)), TileSpec(own_bits=PLAIN)
            self.layer.factors[name] = Factors(u_weight, v_weight, rank, columns, 0)
            self.layer.expert_bytes += v[0].nbytes
            if self.keep_truth:
                self.add_truth(name, u[..., :rank].float() @ v.float())
        return self.layer

    def bitmap(self) -> Layer:
        """A quarter of each matrix kept, anywhere; exactly as much in every expert."""
        self.center()
        experts, size_i, size_h = self.matrix
        kept = int(RETAIN_RATIO * size_i * size_h)
        for name in PROJECTIONS:
            values = self.normal(experts, kept, scale=self.scale)
            masks = torch.zeros(experts, size_i, 8 * -(-size_h // 64), dtype=torch.uint8, device=self.device)
            row_ptr = torch.empty(experts, size_i, dtype=torch.int32, device=self.device)
            for expert in range(experts):
                scores = torch.rand(size_i * size_h, generator=self.generator, device=self.device)
                keep = torch.zeros(size_i * size_h, dtype=torch.bool, device=self.device)
                keep[scores.topk(kept, sorted=False).indices] = True
                keep = keep.view(size_i, size_h)
                counts = keep.sum(1)
                row_ptr[expert] = counts.cumsum(0) - counts
                masks[expert] = pack_bits(keep)
                if self.keep_truth:
                    rows = torch.zeros(keep.shape, dtype=self.dtype, device=self.device)
                    rows.masked_scatter_(keep, values[expert])
                    self.add_truth(
                        name,
                        torch.zeros(self.matrix, device=self.device).index_copy_(
                            0, torch.tensor([expert], device=self.device), rows.float()[None]
                        ),
                    )
            pointers = column_pointers(masks)
            tile = Tile(
                mask=masks,
                pointers=pointers,
                row_ptr=row_ptr,
                kept_values=values,
                mask_stride=masks.stride(0),
                pointers_stride=pointers.stride(0),
                row_ptr_stride=row_ptr.stride(0),
                values_stride=values.stride(0),
            )
            self.layer.tiles[name] = tile, TileSpec(value_bits=PLAIN)
            self.layer.expert_bytes += masks[0].nbytes + row_ptr[0].nbytes + values[0].nbytes
        return self.layer

    def quantized(self) -> Layer:
        """Codes of 4 bits, a scale for each 64 columns."""
        self.center()
        experts, size_i, size_h = self.matrix
        groups = -(-size_h // GROUP)
        for name in PROJECTIONS:
            codes = torch.randint(
                256,
                (experts, size_i, 4 * -(-size_h // 8)),
                generator=self.generator,
                device=self.device,
                dtype=torch.uint8,
            )
            scales = torch.rand(experts, size_i, groups, generator=self.generator, device=self.device)
            scales = (scales * self.scale / 8).bfloat16()
            words = octets_view(codes, 4)
            tile = Tile(own=words, own_scales=scales, own_stride=words.stride(0), own_scales_stride=scales.stride(0))
            self.layer.tiles[name] = tile, TileSpec(own_bits=4, own_group=GROUP)
            self.layer.expert_bytes += codes[0].nbytes + scales[0].nbytes
            if self.keep_truth:
                levels = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :size_h].float() - 7.5
                self.add_truth(name, levels * scales.float().repeat_interleave(GROUP, -1)[..., :size_h])
        return self.layer


LAYER_MAKERS: dict[str, Callable[[Maker], Layer]] = {
    "dense": Maker.dense,
    "low_rank": Maker.low_rank,
    "bitmap": Maker.bitmap,
    "quantized": Maker.quantized,
}


def make_layer(
    shape: MoEShape, method: str, device: str, dtype: torch.dtype, seed: int, *, keep_truth: bool = False
) -> Layer:
    """A random layer of one of ``LAYER_MAKERS``."""
    return LAYER_MAKERS[method](Maker(shape, device, dtype, seed, keep_truth=keep_truth))


def pack_bits(keep: Tensor) -> Tensor:
    """Booleans ``[I, H]`` to uint8 ``[I, 8*ceil(H/64)]``, column c at bit ``c % 8`` of byte ``c // 8``."""
    padded = torch.zeros(len(keep), 64 * -(-keep.shape[1] // 64), dtype=torch.int32, device=keep.device)
    padded[:, : keep.shape[1]] = keep
    weights = 1 << torch.arange(8, device=keep.device, dtype=torch.int32)
    return (padded.unflatten(1, (-1, 8)) * weights).sum(-1).to(torch.uint8)


def layer_ref(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, truth: dict[str, Tensor]) -> Tensor:
    """The layer on restored weights, expert by expert, fp32."""
    out = torch.zeros(x.shape, device=x.device)
    for expert in range(len(truth["gate"])):
        gate, up, down = (truth[name][expert] for name in PROJECTIONS)
        hidden = SILU(x.float() @ gate.T, x.float() @ up.T)
        share = (topk_weights * (topk_ids == expert)).sum(1, keepdim=True)
        out += share * (hidden @ down)
    return out
