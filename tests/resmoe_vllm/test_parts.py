"""The plugin knows every part of the format, and by no other name than the part's own."""

import pytest
import torch

from compress_tools.format.parts.base import Part
from compress_tools.format.schema import (
    ExpertNames,
    LayerSpec,
    QuantizedResidual,
    ResMoEFormat,
    part_classes,
    version_for,
)
from compress_tools.format.tensors import expert_tensors, shared_tensors
from resmoe_vllm import ops
from resmoe_vllm.weights.dummy import dummy_tensors
from resmoe_vllm.weights.layout import make_layout
from tests.compress_tools.format.test_parts import EXAMPLES, JOINT, SIZES


def layer_of(part: Part) -> ResMoEFormat:
    """A layer of the part, and of 2-bit codes where it covers too little, or is a center."""
    rest = QuantizedResidual(projections=JOINT, bits=2)
    center = (part,) if type(part).__name__.endswith("Center") else ()
    residual = () if center else (part,)
    if part.method != "quantized" or center:
        residual = (*residual, rest)
    elif part.projections != JOINT:
        left = tuple(projection for projection in JOINT if projection not in part.projections)
        residual = (*residual, rest.model_copy(update={"projections": left}))
    spec = LayerSpec(center=center, residual=residual)
    return ResMoEFormat(
        format_version=version_for([spec], {}),
        written_by="tests",
        dtype=SIZES.dtype,
        num_experts=3,
        hidden_size=SIZES.hidden_size,
        intermediate_size=SIZES.intermediate_size,
        names=ExpertNames(expert="{layer}.{expert}", projections={name: name for name in JOINT}),
        layers={0: spec},
    )


def test_kernels_read_every_part() -> None:
    assert {coder for cls in part_classes() for coder in cls.kernel_coders} == ops.CODERS


@pytest.mark.parametrize("part", EXAMPLES, ids=lambda part: f"{type(part).__name__}-{part.describe()}")
def test_a_layers_coders_are_its_parts(part: Part) -> None:
    fmt = layer_of(part)
    layout = make_layout(fmt, fmt.layers[0], tp_size=1)
    assert layout.coders == {part.kernel_coder, "quantized"} - {None}


@pytest.mark.parametrize("part", EXAMPLES, ids=lambda part: f"{type(part).__name__}-{part.describe()}")
def test_dummy_tensors_are_what_an_expert_could_have(part: Part) -> None:
    fmt = layer_of(part)
    made = dummy_tensors(fmt, fmt.layers[0])
    specs = [*shared_tensors(fmt, fmt.layers[0]), *expert_tensors(fmt, fmt.layers[0], 0)]
    assert {key: tuple(tensor.shape) for key, tensor in made.items()} == {
        (spec.projection, spec.suffix): spec.shape for spec in specs
    }
    assert part.stored_fault(made) is None
    assert all(rows.isfinite().all() for rows in part.decode(made, SIZES.hidden_size).values())
    for spec in specs:
        if spec.role in ("scales", "mask"):
            assert spec.number_fault(made[spec.projection, spec.suffix], torch.float32) is None
            assert spec.padding_fault(made[spec.projection, spec.suffix]) is None
