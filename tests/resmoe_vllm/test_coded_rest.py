"""Layers that take codes and plain weights: slices, what is refused, and where a GPU keeps codes. No engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress_tools.errors import CheckpointError, FormatError
from compress_tools.format.rest import ROW_CODES, ROW_SCALES, decode_rows, encode_rows
from resmoe_vllm import coded_rest
from resmoe_vllm.coded_rest import CodedEmbeddingMethod, CodedLinearMethod
from tests.compress_tools.format.golden.make import REST

SHAPE = (6, 8)


class Layer(nn.Module):
    """As vLLM's linear layers and embeddings load: rows at an offset."""

    def __init__(self, method: Any, shape: tuple[int, int] = SHAPE, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.quant_method, self.params_dtype = method, dtype
        self.input_size_per_partition = shape[1]
        method.create_weights(self, shape[1], [shape[0]], shape[1], shape[0], dtype, weight_loader=self.weight_loader)

    def weight_loader(self, param: nn.Parameter, stored: torch.Tensor, offset: int = 0) -> None:
        assert param.output_dim == 0
        param.data[offset : offset + len(stored)].copy_(stored)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture(autouse=True)
def _names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded_rest, "is_dummy_load", lambda: False)
    monkeypatch.setattr(coded_rest, "embeddings_are_tied", lambda: False)


def linear(said: list[str], **options: Any) -> Layer:
    return Layer(CodedLinearMethod("model.layers.0.q_proj", said.append), **options)


def embedding(said: list[str], *, is_a_drafts: bool = False) -> Layer:
    return Layer(CodedEmbeddingMethod("model.embed_tokens", said.append, is_a_drafts=is_a_drafts))


def weights(rows: int = 6, columns: int = 8) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


def load(layer: Layer, name: str, tensor: torch.Tensor, *args: Any) -> None:
    parameter = layer.get_parameter(name)
    parameter.weight_loader(parameter, tensor, *args)


def load_codes(layer: Layer, weight: torch.Tensor, *args: Any) -> None:
    for name, tensor in zip((ROW_CODES, ROW_SCALES), encode_rows(weight), strict=True):
        load(layer, name, tensor, *args)


def process(layer: Layer) -> None:
    layer.quant_method.process_weights_after_loading(layer)


def test_a_layer_has_no_memory_until_it_is_loaded(said: list[str]) -> None:
    layer = linear(said)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "weight": (6, 8), ROW_CODES: (6, 8), ROW_SCALES: (6, 1)
    }  # fmt: skip
    assert sum(p.untyped_storage().nbytes() for p in layer.parameters()) <= 4 + 1 + 2
    load_codes(layer, weights())
    assert sum(p.untyped_storage().nbytes() for p in layer.parameters()) == 4 + 48 + 12


def test_fused_matrices_in_codes(said: list[str]) -> None:
    """Two stored matrices, one after the other, in one layer; held in codes, and multiplied so."""
    layer, first, second = linear(said), weights(2), weights(4)
    load_codes(layer, second, 2)
    load_codes(layer, first)
    process(layer)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "weight_scale"]
    assert layer.weight.dtype == torch.int8
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(7))
    decoded = torch.cat([decode_rows(*encode_rows(part), torch.float32) for part in (first, second)])
    torch.testing.assert_close(layer.quant_method.apply(layer, x), x @ decoded.T)
    assert said == ["attention, dense layers and embeddings are held in 8 bits: the C++ kernel multiplies"]


def test_a_plain_weight_leaves_the_layer_to_vllm(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded_rest.PlainLinearMethod, "process_weights_after_loading", lambda *_: None)
    layer = linear(said)
    load(layer, "weight", weights())
    process(layer)
    assert type(layer.quant_method) is coded_rest.PlainLinearMethod
    assert torch.equal(layer.weight, weights())
    assert said == []


def test_a_loader_that_a_model_puts_in_place_loads_codes_too(said: list[str]) -> None:
    """As state spaces do, whose rows are cut in a way of their own."""
    layer = linear(said)
    offsets: list[int] = []

    def own(param: nn.Parameter, stored: torch.Tensor) -> None:
        offsets.append(len(stored))
        param.data[:] = stored.flip(0)

    del layer.weight.weight_loader
    assert not hasattr(layer.weight, "weight_loader")
    layer.weight.weight_loader = own
    load_codes(layer, weights())
    process(layer)
    assert offsets == [6, 6]
    decoded = decode_rows(layer.weight, layer.weight_scale, torch.float32)
    assert torch.equal(decoded, decode_rows(*encode_rows(weights()), torch.float32).flip(0))


def test_what_is_not_whole_is_refused(said: list[str]) -> None:
    nothing, half, no_scales, mixed = (linear(said) for _ in range(4))
    load_codes(half, weights(2))
    load(no_scales, ROW_CODES, encode_rows(weights())[0])
    load_codes(mixed, weights(2))
    load(mixed, "weight", weights(4), 2)
    for layer, message in (
        (nothing, "model.layers.0.q_proj: its weight is not in the checkpoint"),
        (half, "model.layers.0.q_proj: not all of its codes are in the checkpoint"),
        (no_scales, "model.layers.0.q_proj: its weight is not in the checkpoint, or in part"),
        (mixed, "model.layers.0.q_proj: a part of it is in 8-bit codes in the checkpoint and a part is not"),
    ):
        with pytest.raises(CheckpointError, match=message):
            process(layer)


@pytest.mark.parametrize(
    ("scale", "sentence"),
    [
        (-0.5, "holds a scale that is negative, NaN or infinite"),
        (float("inf"), "holds a scale that is negative, NaN or infinite"),
        (2.0**127, r"holds a scale of 1\.7e\+38, whose weights are beyond float32"),
        (0.0, "holds codes in a row whose scale is 0"),
    ],
)
def test_what_the_format_forbids_is_not_served(scale: float, sentence: str, said: list[str]) -> None:
    layer, (codes, scales) = linear(said), encode_rows(weights())
    scales[3] = scale
    load(layer, ROW_CODES, codes)
    load(layer, ROW_SCALES, scales)
    with pytest.raises(FormatError, match=rf"^model\.layers\.0\.q_proj: its weight in codes {sentence};"):
        process(layer)


def test_a_drafts_embedding_need_not_be_stored(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded_rest.PlainEmbeddingMethod, "process_weights_after_loading", lambda *_: None)
    layer = embedding(said, is_a_drafts=True)
    process(layer)
    assert layer.weight.shape == SHAPE
    with pytest.raises(CheckpointError, match=r"model.embed_tokens: its weight is not in the checkpoint"):
        process(embedding(said))


def test_tokens_rows_are_decoded(said: list[str]) -> None:
    layer = embedding(said)
    load_codes(layer, weights())
    process(layer)
    tokens = torch.tensor([[3, 0], [5, 3]])
    expected = decode_rows(*encode_rows(weights()), torch.float32)[tokens]
    assert torch.equal(layer.quant_method.embedding(layer, tokens), expected)


def test_a_tied_output_layer_shares_its_embeddings_codes(said: list[str]) -> None:
    """Loaded once; both hold the same memory, before loading and after."""
    tokens, output = embedding(said), embedding(said)
    assert output.quant_method.tie_weights(output, tokens) is output
    assert all(one is other for one, other in zip(tokens.parameters(), output.parameters(), strict=True))
    load_codes(tokens, weights())
    process(tokens)
    process(output)
    assert output.weight.data_ptr() == tokens.weight.data_ptr()
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(8))
    expected = x @ decode_rows(*encode_rows(weights()), torch.float32).T
    torch.testing.assert_close(output.quant_method.apply(output, x), expected)


def test_random_weights_are_in_codes(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``--load-format dummy`` loads nothing, and fills what has floating-point numbers."""
    monkeypatch.setattr(coded_rest, "is_dummy_load", lambda: True)
    layer = linear(said)
    layer.get_parameter(ROW_SCALES).data.uniform_(0, 1e-3)
    process(layer)
    assert layer.weight.dtype == torch.int8
    assert int(layer.weight.min()) >= -127


class Kernel:
    """Stands in for one of vLLM's: remembers what it was made for, multiplies as its packing says."""

    def __init__(self, full_shape: tuple[int, int], shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.asked, self.processed = (full_shape, shape, dtype), False

    def process_weights_after_loading(self, layer: Layer) -> None:
        self.processed = True
        assert layer.weight_packed.dtype == torch.int32
        assert (layer.weight_packed.input_dim, layer.weight_packed.output_dim, layer.weight_packed.packed_dim) == (
            1,
            0,
            1,
        )

    def apply_weights(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        shifts = torch.arange(0, 32, 8)
        codes = (layer.weight_packed[..., None] >> shifts & 255).flatten(1) - 128
        out = x @ (codes * layer.weight_scale).to(x.dtype).T
        return out if bias is None else out + bias


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selection as on a GPU; what is multiplied is the CPU's."""
    monkeypatch.setattr(coded_rest, "platform_device", lambda: "cuda")
    monkeypatch.setattr(coded_rest.PlainLinearMethod, "process_weights_after_loading", lambda *_: None)
    monkeypatch.setattr(coded_rest.PlainEmbeddingMethod, "process_weights_after_loading", lambda *_: None)
    monkeypatch.setattr(coded_rest, "weight_only_kernel", Kernel)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_keeps_codes_where_vllm_has_a_kernel(said: list[str]) -> None:
    layer = linear(said)
    load_codes(layer, weights())
    process(layer)
    kernel = layer.quant_method._kernel
    assert kernel.asked == ((8, 6), (8, 6), torch.float32)
    assert kernel.processed
    x, bias = torch.randn(3, 8, generator=torch.Generator().manual_seed(9)), torch.arange(6.0)
    expected = x @ decode_rows(*encode_rows(weights()), torch.float32).T + bias
    torch.testing.assert_close(layer.quant_method.apply(layer, x, bias), expected)
    assert said == ["layers in 8-bit codes are held in 8 bits: vLLM's Kernel multiplies"]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("columns", [8, 7], ids=["no kernel", "no whole int32"])
def test_a_gpu_restores_what_no_kernel_takes(columns: int, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if columns == 8:
        monkeypatch.setattr(coded_rest, "weight_only_kernel", lambda *_: None)
    layer = linear(said, shape=(6, columns), dtype=torch.bfloat16)
    load_codes(layer, weights(6, columns))
    process(layer)
    assert type(layer.quant_method) is coded_rest.PlainLinearMethod
    assert torch.equal(layer.weight, decode_rows(*encode_rows(weights(6, columns)), torch.bfloat16))
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert said == [
        "layers in 8-bit codes without a kernel of vLLM's are restored to torch.bfloat16 as they are loaded"
    ]


@pytest.mark.usefixtures("gpu")
def test_a_gpus_embedding_keeps_codes_unless_it_is_tied(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = embedding(said)
    load_codes(layer, weights())
    process(layer)
    assert layer.weight.dtype == torch.int8
    assert said == ["the embedding is held in 8 bits: rows of tokens are decoded as they are read"]
    monkeypatch.setattr(coded_rest, "embeddings_are_tied", lambda: True)
    tokens, output = embedding(said), embedding(said)
    output.quant_method.tie_weights(output, tokens)
    load_codes(tokens, weights())
    process(tokens)
    process(output)
    assert tokens.weight is output.weight
    assert torch.equal(tokens.weight, decode_rows(*encode_rows(weights()), torch.float32))


def test_the_config_gives_these_methods_where_the_rest_is_in_codes() -> None:
    import json

    from resmoe_vllm.config import ResMoEConfig

    block = json.loads((Path(REST) / "config.json").read_text())["quantization_config"]
    assert ResMoEConfig.from_config(block).fmt.rest_tensors == {"lm_head.weight"}
