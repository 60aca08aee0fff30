"""Quantised sources against independent decoders: compressed-tensors' and transformers' own, bit for bit."""

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from compress_tools.errors import CheckpointError
from compress_tools.source.stored_forms import StoredForm, find_forms, is_activation_scale

NAMES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


@pytest.fixture(autouse=True)
def eager():
    """compressed-tensors compiles its packing, for minutes."""
    with torch.compiler.set_stance("force_eager"):
        yield


class Stored(dict[str, Tensor]):
    """Tensors by name, with the headers that a checkpoint gives."""

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)

    def dtype(self, name: str) -> str:
        return NAMES[self[name].dtype]

    def get(self, name: str) -> Tensor:
        return self[name]

    def form(self, name: str, **options: Any) -> StoredForm:
        found = find_forms(list(self), self, **options)
        assert set(found) == {name}
        return found[name]

    def decoded(self, name: str, **options: Any) -> Tensor:
        form = self.form(name, **options)
        made = form.decode({role: self[own] for role, own in form.parts.items()})
        assert made.dtype == torch.bfloat16
        assert tuple(made.shape) == form.shape
        return made


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def transformers_decoded(values: Tensor, scales: Tensor) -> Tensor:
    """What transformers makes of fp8 and DeepSeek's fp4."""
    return Fp8Dequantize(None)._dequantize_one(values, scales, torch.bfloat16)


def compressed(weight: Tensor, form: str, **arguments: Any) -> tuple[Stored, Tensor]:
    """``weight`` as compressed-tensors stores it, named ``w.weight``, and as compressed-tensors decodes that."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    args, group = scheme.weights, arguments.get("group_size")
    grouped = weight.unflatten(-1, (-1, group)) if group else weight[:, None, :]
    state: dict[str, Tensor] = {"weight": weight}
    if form.startswith("nvfp4"):
        state["weight_global_scale"] = (2688.0 / weight.float().abs().max()).reshape(1)
        state["weight_scale"] = (grouped.abs().amax(-1) / 6 * state["weight_global_scale"]).to(torch.float8_e4m3fn)
        state["weight_scale"] = state["weight_scale"].float()
    elif form.startswith("mx"):
        state["weight_scale"] = torch.exp2(torch.floor(torch.log2(grouped.abs().amax(-1))) - 2)
    else:
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        state["weight_scale"], state["weight_zero_point"] = scale.bfloat16(), zero
        if args.strategy == "channel":
            state = {name: tensor.reshape(len(weight), -1) for name, tensor in state.items()}
    compressor = BaseCompressor.get_value_from_registry(form)
    made = compressor.compress(state, scheme)
    decoded = compressor.decompress(dict(made), scheme)["weight"].bfloat16()
    return Stored({f"w.{name}": tensor for name, tensor in made.items()}), decoded


@pytest.mark.parametrize(
    ("form", "arguments"),
    [
        ("pack-quantized", {"num_bits": 4, "group_size": 32, "strategy": "group"}),
        ("pack-quantized", {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": False}),
        ("pack-quantized", {"num_bits": 4, "group_size": 128, "strategy": "group"}),
        ("pack-quantized", {"num_bits": 8, "group_size": 64, "strategy": "group"}),
        ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
        ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("naive-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}),
        ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 32, "strategy": "group"}),
        (
            "mxfp8-quantized",
            {"num_bits": 8, "type": "float", "group_size": 32, "strategy": "group", "scale_dtype": torch.uint8},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_compressed_tensors_decodes_the_same(form: str, arguments: dict[str, Any]):
    stored, expected = compressed(random(24, 256).bfloat16(), form, **arguments)
    assert torch.equal(stored.decoded("w.weight"), expected)


@pytest.mark.parametrize("columns", [1, 7, 31, 32, 33])
def test_packed_rows_end_anywhere(columns: int):
    stored, expected = compressed(random(5, columns).bfloat16(), "pack-quantized", num_bits=4, strategy="channel")
    assert stored.form("w.weight").shape == (5, columns)
    assert torch.equal(stored.decoded("w.weight"), expected)


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("grid", [(2, 3), (256, 1), (1, 1)], ids=["blocks", "rows", "tensor"])
def test_transformers_decodes_fp8_the_same(fp8: torch.dtype, grid: tuple[int, int]):
    values, scales = random(256, 384).to(fp8), random(*grid, seed=1).abs()
    stored = Stored({"w.weight": values, "w.weight_scale_inv": scales})
    assert torch.equal(stored.decoded("w.weight"), transformers_decoded(values, scales))


def test_transformers_decodes_deepseeks_fp4_the_same():
    values = torch.randint(-128, 128, (32, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scales = (random(32, 4, seed=1).abs()).to(torch.float8_e8m0fnu)
    stored = Stored({"w1.weight": values, "w1.scale": scales})
    assert stored.form("w1.weight").title.startswith("mxfp4")
    assert torch.equal(stored.decoded("w1.weight"), transformers_decoded(values, scales))


def test_transformers_decodes_gpt_oss_the_same():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 48, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 132, (3, 48, 2), dtype=torch.uint8, generator=generator)
    stored = Stored({"experts.gate_up_proj_blocks": blocks, "experts.gate_up_proj_scales": scales})
    form = stored.form("experts.gate_up_proj")
    expected = convert_moe_packed_tensors(blocks, scales)
    assert form.shape == tuple(expected.shape) == (3, 64, 48)
    assert torch.equal(stored.decoded("experts.gate_up_proj"), expected)
    for expert in range(3):
        assert torch.equal(form.row({"values": blocks, "scales": scales}, expert), expected[expert])


def test_modelopts_nvfp4():
    """The formula of vLLM's reference: ``value * (scale * scale_2)``."""
    codes = torch.randint(0, 256, (8, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scales, whole = random(8, 4, seed=1).abs().to(torch.float8_e4m3fn), torch.tensor(0.037)
    stored = Stored({"w.weight": codes, "w.weight_scale": scales, "w.weight_scale_2": whole})
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    expected = torch.empty(8, 64)
    for row in range(8):
        for column in range(64):
            code = int(codes[row, column // 2]) >> 4 * (column % 2) & 15
            value = table[code & 7] * (-1 if code & 8 else 1)
            expected[row, column] = value * (scales[row, column // 16].float() * whole)
    assert torch.equal(stored.decoded("w.weight"), expected.bfloat16())


@pytest.mark.parametrize("scale_shape", [(4, 1, 1), (4, 2, 3)], ids=["an expert each", "blocks"])
def test_fused_experts_decode_whole_and_one_by_one(scale_shape: tuple[int, ...]):
    values, scales = random(4, 256, 384).to(torch.float8_e4m3fn), random(*scale_shape, seed=1).abs()
    stored = Stored({"experts.gate_up_proj": values, "experts.gate_up_proj_scale_inv": scales})
    form, whole = stored.form("experts.gate_up_proj"), stored.decoded("experts.gate_up_proj")
    for expert in range(4):
        assert torch.equal(whole[expert], transformers_decoded(values[expert], scales[expert]))
        assert torch.equal(form.row({"values": values, "scales": scales}, expert), whole[expert])


@settings(max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([(128, 128), (32, 64)]))
def test_blocks_at_the_edges_are_cut(rows: int, columns: int, block: tuple[int, int]):
    values = random(rows, columns).to(torch.float8_e4m3fn)
    grid = -(-rows // block[0]), -(-columns // block[1])
    scales = random(*grid, seed=1).abs()
    stored = Stored({"w.weight": values, "w.weight_scale_inv": scales})
    row, column = torch.arange(rows)[:, None] // block[0], torch.arange(columns) // block[1]
    expected = values.float() * scales[row, column]
    assert torch.equal(stored.decoded("w.weight", block=block), expected.bfloat16())


def test_plain_tensors_are_no_form():
    stored = Stored({"a.weight": random(4, 4), "b.bias": random(4), "mask": torch.zeros(4, 4, dtype=torch.uint8)})
    assert find_forms(list(stored), stored) == {}


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"w.weight": random(4, 4).to(torch.float8_e4m3fn)}, "without a scale"),
        ({"w.qweight": torch.zeros(4, 4, dtype=torch.int32)}, "GPTQ or AWQ"),
        ({"w.weight_packed": torch.zeros(4, 4, dtype=torch.int32)}, "without scales"),
        ({"x_blocks": torch.zeros(2, 4, 2, 16, dtype=torch.uint8)}, "no 'x_scales'"),
        (
            {"w.weight": random(4, 4).to(torch.float8_e4m3fn), "w.weight_scale_inv": random(3, 7)},
            "fit no known form",
        ),
        ({"w.weight": random(4, 4).to(torch.float8_e4m3fn), "w.weight_scale": random(0, 1)}, "fit no known form"),
        ({"w.weight": random(4, 4).to(torch.float8_e4m3fn), "w.weight_scale": random(4, 0)}, "fit no known form"),
        ({"w.weight": random(0, 4).to(torch.float8_e4m3fn), "w.weight_scale": random(4, 1)}, "fit no known form"),
        (
            {
                "w.weight_packed": torch.zeros(4, 32, dtype=torch.uint8),
                "w.weight_scale": torch.zeros(4, 4).to(torch.float8_e4m3fn),
            },
            "nvfp4 without",
        ),
        (
            {
                "w.weight_packed": torch.zeros(4, 8, dtype=torch.int32),
                "w.weight_scale": random(4, 2),
                "w.weight_g_idx": torch.zeros(64, dtype=torch.int32),
            },
            "reordered columns",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tensors: dict[str, Tensor], sentence: str):
    stored = Stored(tensors)
    with pytest.raises(CheckpointError, match=sentence):
        find_forms(list(stored), stored)


def test_activation_scales_are_told_apart():
    assert is_activation_scale("model.layers.0.mlp.down_proj.input_scale")
    assert is_activation_scale("experts.gate_up_proj_activation_scale")
    assert not is_activation_scale("w.weight_scale")
    assert not is_activation_scale("model.layers.0.mlp.gate.weight")
