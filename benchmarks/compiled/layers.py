"""The layers whose kernels are compiled: published shapes, each way of coding them, bound as the plugin binds them."""

from typing import Any

import torch

from benchmarks.harness.shapes import SHAPES, MoEShape
from benchmarks.models.synthetic_layer import synthetic_format
from compress_tools.format.schema import ResMoEFormat
from resmoe_vllm.kernels.activation import SILU
from resmoe_vllm.ops import BoundLayer
from resmoe_vllm.weights.layer_loader import BoundGroup
from resmoe_vllm.weights.layout import make_layout

# Those of the benchmarks, and what they leave out: one expert for each token, ten, and the widest.
MATRIX_SHAPES = SHAPES | {
    shape.name: shape
    for shape in (
        MoEShape("Llama-4-Scout", 5120, 8192, 16, 1, 48),
        MoEShape("Qwen3-Next-80B-A3B", 2048, 512, 512, 10, 48),
        MoEShape("DeepSeek-V3", 7168, 2048, 256, 8, 58),
    )
}
# Options of `resmoe compress`.
MATRIX_METHODS: dict[str, dict[str, Any]] = {
    "low-rank": {"method": "low-rank", "retain_ratio": 0.25},
    "low-rank-8bit": {"method": "low-rank", "retain_ratio": 0.25, "factor_bits": 8, "center_bits": 8},
    "prune": {"method": "prune", "retain_ratio": 0.25},
    "prune-4bit": {"method": "prune", "retain_ratio": 0.25, "value_bits": 4, "center_bits": 8},
    "prune-rows": {"method": "prune", "retain_ratio": 0.25, "prune_rows": "equal"},
    "quantize-4bit": {"method": "quantize", "bits": 4, "center_bits": 8},
    "quantize-4bit-alone": {"method": "quantize", "bits": 4, "center": "none"},
    "quantize-3bit": {"method": "quantize", "bits": 3, "center_bits": 4},
    "trellis-4bit": {"method": "trellis", "bits": 4, "center_bits": 8},
    "trellis-2bit-alone": {"method": "trellis", "bits": 2, "center": "none"},
    "low-rank+trellis": {"method": "low-rank+trellis", "bits": 3, "center_bits": 4, "center_coder": "trellis"},
}


def matrix_layer(shape: MoEShape, method: str, dtype: str, experts: int | None = None) -> BoundLayer:
    """A layer bound to the kernels; arguments as of ``matrix_groups``."""
    return BoundLayer(matrix_groups(shape, method, dtype, experts), SILU, "cuda")


def matrix_groups(shape: MoEShape, method: str, dtype: str, experts: int | None = None) -> list[BoundGroup]:
    """A layer's weights, whose memory is never written.

    Args:
        shape: the model's.
        method: of ``MATRIX_METHODS``.
        dtype: bfloat16 or float16.
        experts: on this rank; all if None.
    """
    return unwritten_groups(synthetic_format(shape, dtype, **MATRIX_METHODS[method]), experts)


def unwritten_groups(fmt: ResMoEFormat, experts: int | None = None) -> list[BoundGroup]:
    """Weights of a format's first layer, whose memory is never written; ``experts`` on this rank, all if None."""
    layout = make_layout(fmt, fmt.layers[0], tp_size=1, padded=True)
    rows = fmt.num_experts if experts is None else experts
    tensors = [
        torch.empty(1 if shared else rows, columns, dtype=getattr(torch, kind))
        for columns, kind, shared in layout.params.values()
    ]
    return [BoundGroup(layout.bind(tensors), None)]


def matrix_call(kernel: BoundLayer, shape: MoEShape, tokens: int, dtype: str) -> None:
    """One call of a layer, with memory that nobody wrote."""
    x = torch.empty(tokens, shape.hidden, dtype=getattr(torch, dtype))
    ids = torch.empty(tokens, shape.top_k, dtype=torch.int32)
    kernel(x, torch.empty(tokens, shape.top_k), ids)
