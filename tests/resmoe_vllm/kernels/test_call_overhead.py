"""What stands around the C++ kernel in each call of the op: counted, since times depend on the machine's load."""

import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness.shapes import MoEShape
from benchmarks.models.synthetic_layer import synthetic_format, synthetic_layer
from resmoe_vllm import ops
from resmoe_vllm.kernels.activation import SILU
from resmoe_vllm.kernels.cpu.build import missing_cpu_flags
from resmoe_vllm.weights.layer_loader import BoundGroup
from tests.resmoe_vllm.kernels.test_vllm_kernels import forward_pass

pytestmark = pytest.mark.skipif(bool(missing_cpu_flags()), reason="the processor has no C++ kernel")

SHAPE = MoEShape("tiny", 64, 32, 8, 2, 1)
# fused_moe, quant_method_of, get_forward_context, BoundLayer and NativeKernel; what torch.ops and vLLM's modules put
# between them.
MOST_FRAMES = 8


@pytest.fixture(scope="module")
def layer() -> ops.BoundLayer:
    layout, tensors = synthetic_layer(synthetic_format(SHAPE, method="trellis", bits=4, center_bits=8), 0)
    return ops.BoundLayer([BoundGroup(layout.bind(tensors), None)], SILU, "cpu")


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(1, SHAPE.hidden).bfloat16(), torch.rand(1, 2), torch.tensor([[1, 3]], dtype=torch.int32)


class Counted(TorchDispatchMode):
    """Names of the torch operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_output_is_all_that_torch_makes(layer: ops.BoundLayer) -> None:
    given = inputs()
    with Counted() as counted:
        layer(*given)
    assert counted.names == ["aten.empty_like.default"]


def test_numbers_of_other_types_are_converted(layer: ops.BoundLayer) -> None:
    x, weights, ids = inputs()
    wanted = layer(x, weights, ids)
    others = weights.double(), ids.long()
    with Counted() as counted:
        found = layer(x, *others)
    assert torch.equal(found, wanted)
    assert sum("copy" in name for name in counted.names) == 2


def test_few_functions_are_called(layer: ops.BoundLayer) -> None:
    given = inputs()
    called: list[str] = []

    def note(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call":
            called.append(frame.f_code.co_qualname)

    with forward_pass(layer=layer):
        torch.ops.resmoe.fused_moe(*given, None, "layer")
        sys.setprofile(note)
        try:
            torch.ops.resmoe.fused_moe(*given, None, "layer")
        finally:
            sys.setprofile(None)
    assert "NativeKernel.__call__" in called
    assert len(called) <= MOST_FRAMES, called
