"""The CPU kernel's memory under requests of many lengths: no more for 1,500 of them than for the longest."""

import psutil
import pytest
import torch

from benchmarks.harness.shapes import MoEShape
from benchmarks.models.synthetic_layer import synthetic_format, synthetic_layer
from resmoe_vllm.kernels.activation import SILU
from resmoe_vllm.kernels.cpu.build import missing_cpu_flags
from resmoe_vllm.kernels.cpu.dispatch import bind

SHAPE = MoEShape("small", 256, 64, 8, 2, 1)
LENGTHS = 1500
MOST_GROWTH = 16 * 2**20


@pytest.mark.skipif(bool(missing_cpu_flags()), reason="the processor has no C++ kernel")
@pytest.mark.parametrize("options", [{"method": "trellis", "bits": 4, "center_bits": 8}, {"method": "low-rank"}])
def test_many_lengths_leave_nothing_behind(options: dict[str, object]) -> None:
    layout, tensors = synthetic_layer(synthetic_format(SHAPE, **options), 0)
    kernel = bind(layout.bind(tensors), SILU)
    generator = torch.Generator().manual_seed(0)

    def serve(tokens: int) -> None:
        ids = torch.rand(tokens, SHAPE.experts, generator=generator).topk(SHAPE.top_k).indices
        kernel(torch.randn(tokens, SHAPE.hidden, generator=generator).bfloat16(), torch.ones(ids.shape), ids.int())

    process = psutil.Process()
    for tokens in (LENGTHS, 1, LENGTHS):
        serve(tokens)
    before = process.memory_info().rss
    for tokens in torch.randperm(LENGTHS, generator=generator).tolist():
        serve(tokens + 1)
    assert process.memory_info().rss - before < MOST_GROWTH
