"""Format-valid random layers of any shape and method, in seconds: for timing, where values don't matter."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.shapes import MoEShape
from compress_tools.config import make_config
from compress_tools.format.dtypes import DTYPES
from compress_tools.format.packing import mask_row_counts, pack_mask
from compress_tools.format.parts.bitmap import MASK
from compress_tools.format.schema import BitmapResidual, ExpertNames, ResMoEFormat, version_for
from compress_tools.residuals.recipes import uniform_spec
from resmoe_vllm.weights import huge_pages
from resmoe_vllm.weights.layer_loader import BoundGroup, LayerLoader
from resmoe_vllm.weights.layout import ROW_PTR, LayerLayout, make_layout

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# The methods that the timing benchmarks compare with dense, as options of `resmoe compress`.
CODINGS: dict[str, dict[str, Any]] = {
    "low-rank": {"method": "low-rank", "retain_ratio": 0.25},
    "low-rank-8bit": {"method": "low-rank", "retain_ratio": 0.25, "factor_bits": 8, "center_bits": 8},
    "prune": {"method": "prune", "retain_ratio": 0.25},
    "quantize-4bit": {"method": "quantize", "bits": 4, "center_bits": 8},
    "trellis-4bit": {"method": "trellis", "bits": 4, "center_bits": 8},
}


def synthetic_format(shape: MoEShape, dtype: str = "bfloat16", layers: int = 1, **options: Any) -> ResMoEFormat:
    """The format block of ``layers`` equal layers, as ``resmoe compress`` would write it with ``options``."""
    config = make_config(**options)
    spec = uniform_spec(config, PROJECTIONS, shape.intermediate, shape.hidden)
    return ResMoEFormat(
        format_version=version_for([spec], {}),
        written_by="synthetic",
        dtype=dtype,
        num_experts=shape.experts,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        names=ExpertNames(
            expert="model.layers.{layer}.mlp.experts.{expert}", projections={name: name for name in PROJECTIONS}
        ),
        layers=dict.fromkeys(range(layers), spec),
    )


def synthetic_layer(fmt: ResMoEFormat, index: int, seed: int = 0) -> tuple[LayerLayout, list[Tensor]]:
    """One layer's parameters as the plugin holds them: (layout, tensors in the op's order)."""
    layout = make_layout(fmt, fmt.layers[index], tp_size=1)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (columns, dtype, shared) in layout.params.items():
        rows = 1 if shared else fmt.num_experts
        kind = DTYPES.get(dtype, torch.int32)
        if kind.is_floating_point:
            line = (fmt.hidden_size**-0.5 * torch.randn(columns, generator=generator)).to(kind)
        else:
            line = torch.randint(256, (columns,), generator=generator).to(kind)
        # One expert's random values, shifted for each: the values don't matter, their memory does.
        stacked = huge_pages.empty((rows, columns), kind, torch.device("cpu"))
        for row, own in enumerate(stacked):
            own.copy_(line.roll(row))
        tensors[name] = stacked
    for part in fmt.layers[index].residual:
        if isinstance(part, BitmapResidual):
            _fill_masks(layout, tensors, part.projections, part.values_per_expert, generator)
    return layout, list(tensors.values())


def gpu_layer(fmt: ResMoEFormat) -> tuple[list[BoundGroup], torch.nn.Module]:
    """A format's first layer on the GPU, as the plugin loads it, of random content; the module owns the memory."""
    loader = LayerLoader(fmt, 0, lambda expert: expert)
    module = torch.nn.Module()
    with torch.device("cuda"):
        loader.create_params(module, DTYPES[fmt.dtype])
    loader.load_dummies()
    return loader.bind(module), module


def _fill_masks(
    layout: LayerLayout,
    tensors: dict[str, Tensor],
    projections: tuple[str, ...],
    kept: int,
    generator: torch.Generator,
) -> None:
    """One random mask with exactly ``kept`` bits, the same for all experts, and its row pointers."""
    rows, columns = layout.intermediate_size, layout.hidden_size
    total = len(projections) * rows * columns
    scores = torch.rand(total, generator=generator)
    keep = torch.zeros(total, dtype=torch.bool)
    keep[scores.topk(kept, sorted=False).indices] = True
    counted = 0
    for projection, bits in zip(projections, keep.view(len(projections), rows, columns), strict=True):
        mask = pack_mask(bits)
        counts = mask_row_counts(mask)
        pointers = counted + counts.cumsum(0) - counts
        counted += int(counts.sum())
        for suffix, value in ((MASK, mask), (ROW_PTR, pointers.int())):
            slot = layout.slots[projection, suffix]
            slot.view(tensors[slot.param])[:] = value
    assert counted == kept
