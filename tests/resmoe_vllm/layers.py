"""One compressed layer without a model: random experts, stored by the format, loaded by the plugin."""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress_tools.format.codec import restore_expert
from compress_tools.format.dtypes import DTYPES
from compress_tools.format.parts.base import Rows
from compress_tools.format.schema import LayerSpec, Projection, ResMoEFormat, version_for
from compress_tools.format.tensors import BIAS
from resmoe_vllm.kernels.activation import SILU, Activation
from resmoe_vllm.ops import BoundLayer
from resmoe_vllm.weights.bound import ResMoEWeights
from resmoe_vllm.weights.layer_loader import LayerLoader
from resmoe_vllm.weights.layout import LayerLayout
from tests.resmoe_vllm.twins import (
    DOWN,
    GATE,
    HF_NAMES,
    PROJECTIONS,
    UP,
    bitmap,
    compress_layer,
    grouped_spec,
    layer_spec,
    low_rank,
    quantized,
    row_bitmap,
    trellis,
)

# What vLLM's loaders say of each tensor: parameter's prefix and shard. Written down, not taken from the plugin's
# table: the inverse of a wrong table would undo it.
VLLM_PLACES = {"gate_proj": ("w13", "w1"), "up_proj": ("w13", "w3"), "down_proj": ("w2", "w2")}
UNGATED_PLACES = {"up_proj": ("w13", "w1"), "down_proj": ("w2", "w2")}
Stored = dict[tuple[Projection, str], Tensor]


def layer_kinds(size_i: int, size_h: int) -> dict[str, LayerSpec]:
    """Specs by name: every grouping, with and without center, at about a third of the weights."""
    rank, count = max(1, min(size_i, size_h) // 3), max(1, size_i * size_h // 3)
    few = max(1, size_h // 3)
    return {
        "low_rank-joint": layer_spec(low_rank(rank, *PROJECTIONS)),
        "low_rank-gate_up+down": layer_spec(low_rank(rank, GATE, UP), low_rank(1, DOWN)),
        "low_rank-each": layer_spec(low_rank(1, GATE), low_rank(rank, UP), low_rank(rank, DOWN)),
        "low_rank-no_center": layer_spec(low_rank(rank, *PROJECTIONS), center=()),
        "bitmap-joint": layer_spec(bitmap(3 * count, *PROJECTIONS)),
        "bitmap-gate_up+down": layer_spec(bitmap(2 * count + 1, GATE, UP), bitmap(count, DOWN)),
        "bitmap-each": layer_spec(bitmap(1, GATE), bitmap(count, UP), bitmap(size_i * size_h, DOWN)),
        "bitmap-down_first-center_up": layer_spec(bitmap(2 * count, DOWN, GATE), bitmap(count, UP), center=(UP,)),
        "both": layer_spec(low_rank(rank, *PROJECTIONS), bitmap(2 * count, UP, DOWN), bitmap(count, GATE)),
        "low_rank-8bit": layer_spec(low_rank(rank, GATE, UP, bits=8), low_rank(1, DOWN)),
        "low_rank-8bit-center-8bit": layer_spec(low_rank(rank, *PROJECTIONS, bits=8), bits=8),
        "bitmap-8bit": layer_spec(bitmap(3 * count, *PROJECTIONS, bits=8, by=64)),
        "bitmap-4bit": layer_spec(bitmap(2 * count + 1, UP, DOWN, bits=4, by=32), bitmap(count, GATE, bits=8)),
        "bitmap_rows": layer_spec(row_bitmap(few, *PROJECTIONS), center=(DOWN, GATE)),
        "bitmap_rows-8_and_4bit": layer_spec(
            row_bitmap(few, GATE, bits=8, by=128), row_bitmap(size_h, UP, DOWN, bits=4, by=32)
        ),
        "quantized-2bit": layer_spec(quantized(2, *PROJECTIONS), bits=8),
        "quantized-3bit": layer_spec(quantized(3, *PROJECTIONS, by=32), bits=4),
        "quantized-4bit-no_center": layer_spec(quantized(4, *PROJECTIONS, by=64), center=()),
        "quantized-8bit-each": layer_spec(quantized(8, DOWN), low_rank(rank, UP), row_bitmap(few, GATE)),
        "quantized-8bit+low_rank+bitmap": layer_spec(
            quantized(8, DOWN, UP, by=32), low_rank(rank, UP, GATE), bitmap(count, DOWN), center=(UP, DOWN), bits=3
        ),
        "low_rank+quantized": layer_spec(low_rank(rank, *PROJECTIONS), quantized(2, *PROJECTIONS, by=32), bits=8),
        "trellis-4bit": layer_spec(trellis(4, *PROJECTIONS), bits=8),
        "trellis-3bit-no_center": layer_spec(trellis(3, *PROJECTIONS, by=32), center=()),
        "trellis-2bit+low_rank": layer_spec(low_rank(rank, *PROJECTIONS), trellis(2, *PROJECTIONS, by=64), bits=3),
        "trellis-1bit-center-trellis": layer_spec(trellis(1, *PROJECTIONS), bits=4, by_trellis=True),
        "low_rank+bitmap+quantized": layer_spec(
            low_rank(rank, DOWN, UP, bits=8), bitmap(count, UP, bits=4), quantized(3, GATE, UP), center=(UP,)
        ),
    }


def grouped_layer(size_i: int, size_h: int) -> LayerSpec:
    """Four experts in three groups, each coded otherwise, none in order."""
    rank, count = max(1, min(size_i, size_h) // 3), max(1, size_i * size_h // 3)
    return grouped_spec(
        ((3, 0), (quantized(2, *PROJECTIONS, by=32),)),
        ((2,), (bitmap(2 * count, GATE, DOWN), bitmap(count, UP, bits=4), low_rank(rank, DOWN))),
        ((1,), (quantized(4, GATE, UP), low_rank(rank, DOWN, UP, bits=8))),
        center=(UP, DOWN),
        bits=8,
    )


def ungated_kinds(size_i: int, size_h: int) -> dict[str, LayerSpec]:
    """Specs of experts without a gate, every coder among them."""
    rank, count = max(1, min(size_i, size_h) // 3), max(1, size_i * size_h // 3)
    few = max(1, size_h // 3)
    return {
        "low_rank": layer_spec(low_rank(rank, UP, DOWN), center=(UP, DOWN)),
        "low_rank-8bit-no_center": layer_spec(low_rank(rank, UP, bits=8), low_rank(1, DOWN), center=()),
        "bitmap": layer_spec(bitmap(2 * count, UP, DOWN), center=(UP, DOWN), bits=8),
        "bitmap_rows-4bit": layer_spec(row_bitmap(few, UP, DOWN, bits=4, by=32), center=(DOWN,)),
        "quantized": layer_spec(quantized(3, UP, by=32), quantized(8, DOWN), center=(UP,)),
        "low_rank+bitmap+quantized": layer_spec(
            low_rank(rank, DOWN, UP), bitmap(count, UP, bits=8), quantized(2, DOWN), center=(UP, DOWN), bits=4
        ),
    }


@dataclass(frozen=True)
class StoredLayer:
    """A layer as the format stores it."""

    fmt: ResMoEFormat
    shared: Stored
    experts: list[Stored]

    @property
    def spec(self) -> LayerSpec:
        """Spec of the one layer."""
        return self.fmt.layers[0]

    def restored(self, expert: int) -> Rows:
        """The format's own meaning of one expert, fp32."""
        return restore_expert(self.spec.of_expert(expert), self.shared, self.experts[expert], self.fmt.hidden_size)


def store_layer(
    spec: LayerSpec, num_experts: int, size_i: int, size_h: int, dtype: str, seed: int = 0, *, biases: bool = False
) -> StoredLayer:
    """Random experts around a common center, compressed; with the spec's projections."""
    generator = torch.Generator().manual_seed(seed)
    scale = size_h**-0.5
    center = {projection: torch.randn(size_i, size_h, generator=generator) for projection in spec.projections}
    experts = [
        {p: scale * (rows + torch.randn(rows.shape, generator=generator)) for p, rows in center.items()}
        for _ in range(num_experts)
    ]
    fmt = ResMoEFormat(
        format_version=version_for([spec], {}),
        written_by="tests",
        dtype=dtype,
        num_experts=num_experts,
        hidden_size=size_h,
        intermediate_size=size_i,
        biases=biases,
        names=HF_NAMES.model_copy(update={"projections": {p: p for p in spec.projections}}),
        layers={0: spec},
    )
    stored = StoredLayer(fmt, *compress_layer(experts, spec, DTYPES[dtype]))
    if biases:
        for own in stored.experts:
            for p in spec.projections:
                size = size_h if p == DOWN else size_i
                own[p, BIAS] = torch.randn(size, generator=generator).to(DTYPES[dtype])
    return stored


def hand_over(
    module: torch.nn.Module, key: tuple[Projection, str], expert: int, tensor: Tensor, *, gated: bool = True
) -> bool:
    """Give one stored tensor to the parameter that vLLM's loaders would pick, in a buffer that is used again."""
    projection, suffix = key
    prefix, shard = (VLLM_PLACES if gated else UNGATED_PLACES)[projection]
    param = getattr(module, f"{prefix}_{suffix}")
    buffer = tensor.clone()
    loaded = param.weight_loader(param, buffer, suffix, shard_id=shard, expert_id=expert, return_success=True)
    buffer.fill_(float("nan") if buffer.is_floating_point() else 0xAA)
    return loaded


def new_loader(
    layer: StoredLayer,
    local_experts: list[int] | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    dtype: torch.dtype | None = None,
    *,
    padded: bool = False,
) -> tuple[torch.nn.Module, LayerLoader]:
    """Parameters full of NaN, and their loader."""
    local = list(range(layer.fmt.num_experts)) if local_experts is None else local_experts

    def local_of(expert: int) -> int:
        return local.index(expert) if expert in local else -1

    loader = LayerLoader(layer.fmt, 0, local_of, tp_size, tp_rank, padded=padded)
    module = torch.nn.Module()
    loader.create_params(module, dtype or DTYPES[layer.fmt.dtype])
    for param in module.parameters():
        param.data.fill_(float("nan") if param.is_floating_point() else 77)
    return module, loader


def load_all(module: torch.nn.Module, loader: LayerLoader, layer: StoredLayer, reverse: bool = False) -> None:
    """Hand over every tensor of the layer, in the writer's order or its reverse."""
    jobs = [(key, 0, tensor) for key, tensor in layer.shared.items()]
    jobs += [(key, e, tensor) for e, stored in enumerate(layer.experts) for key, tensor in stored.items()]
    for key, expert, tensor in reversed(jobs) if reverse else jobs:
        hand_over(module, key, expert, tensor, gated=layer.fmt.gated)
    loader.check_complete()


def parameters_of(module: torch.nn.Module, layout: LayerLayout) -> list[Tensor]:
    """Parameters of a layer of one group, in its layout's order."""
    return [getattr(module, name) for name in layout.params]


def bound_weights(module: torch.nn.Module, loader: LayerLoader) -> ResMoEWeights:
    """The weights of a layer of one group."""
    (group,) = loader.bind(module)
    return group.weights


def bind_layer(module: torch.nn.Module, loader: LayerLoader, activation: Activation = SILU) -> BoundLayer:
    """The layer as the plugin's method binds it after loading."""
    return BoundLayer(loader.bind(module), activation, next(module.parameters()).device.type)
