"""One MoE layer's experts in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress_tools.format.schema import Projection
from compress_tools.numerics.clock import StageClock
from compress_tools.progress.listener import ProgressListener
from compress_tools.source.design_matrix import expert_to_rows, fill_design
from compress_tools.source.moe_source import MoESource


@dataclass(frozen=True)
class LayerWeights:
    """One MoE layer's experts, as read.

    Attributes:
        design: design matrices ``[E, I, P*H]`` in the source's dtype, on the device that computes.
        biases: for each expert its biases by projection; empty where there are none.
    """

    design: Tensor
    biases: list[dict[Projection, Tensor]]


def read_layer(
    source: MoESource, layer: int, dtype: torch.dtype, device: str, progress: ProgressListener, clock: StageClock
) -> LayerWeights:
    """Read one layer's experts; one expert at a time is held beside the result."""
    source.reader.need(source.expected(layer))
    sizes, columns = source.sizes, len(source.projections) * source.sizes.hidden_size
    with clock.stage("read"):
        progress.stage("reading", sizes.num_experts, layer)
        design = torch.empty(sizes.num_experts, sizes.intermediate_size, columns, dtype=dtype, device=device)
        biases: list[dict[Projection, Tensor]] = []
        for expert in range(sizes.num_experts):
            weights = source.read_expert(layer, expert)
            fill_design(design[expert], expert_to_rows(weights))
            biases.append({projection: bias.clone() for projection, bias in weights.biases.items()})
            del weights
            progress.step()
    return LayerWeights(design, biases)
