"""Families that are published quantised alone: whole tiny models in the publisher's precision, names and nesting."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.models.tiny_models import TINY_CONFIGS, save_tiny_model
from compress_tools.config import make_config
from compress_tools.pipeline import compress
from compress_tools.source.moe_source import open_source
from compress_tools.source.source_reader import SourceReader
from compress_tools.stored.restore import restore
from compress_tools.stored.verify import verify

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
# name, its stored tensors by name, and what they stand for
Quantised = tuple[dict[str, Tensor], Tensor]


def fp4(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Quantised:
    """DeepSeek-V4's experts: two codes a byte in I8, the first in the low bits; E8M0 for each 32 columns."""
    codes = torch.randint(0, 16, shape, generator=generator)
    exponents = torch.randint(119, 124, (shape[0], shape[1] // 32), generator=generator)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
    scales = exponents.to(torch.uint8).view(torch.float8_e8m0fnu)
    values = E2M1[codes % 8] * (1 - 2 * (codes // 8))
    decoded = values * torch.exp2(exponents - 127.0).repeat_interleave(32, 1)
    return {name: packed, name.replace(".weight", ".scale"): scales}, decoded.bfloat16()


def fp8_by_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Quantised:
    """Mistral Small 4's experts: 3-D, a scale for each expert, and one of activations, which nothing here uses."""
    codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(shape[0], 1, 1, generator=generator) * 0.1
    stored = {name: codes, f"{name}_scale_inv": scales, f"{name}_activation_scale": torch.ones(shape[0], 1, 1)}
    return stored, (codes.float() * scales).bfloat16()


def int4(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Quantised:
    """Kimi-K2.5's experts: eight numbers from -8 in an I32, the first in the low bits; a scale for each 32 columns."""
    numbers = torch.randint(0, 16, shape, generator=generator)
    scales = (torch.rand(shape[0], shape[1] // 32, generator=generator) * 0.02).bfloat16()
    packed = sum(numbers[:, place::8] << 4 * place for place in range(8)).to(torch.uint32).view(torch.int32)
    decoded = (numbers - 8) * scales.float().repeat_interleave(32, 1)
    stored = {f"{name}_packed": packed, f"{name}_scale": scales, f"{name}_shape": torch.tensor(shape)}
    return stored, decoded.bfloat16()


@pytest.mark.parametrize(
    ("family", "quantise", "changes"),
    [
        pytest.param("deepseek_v4", fp4, {"moe_intermediate_size": 64}, id="DeepSeek-V4"),
        pytest.param("mistral4", fp8_by_tensor, {}, id="Mistral-Small-4"),
        pytest.param(
            "kimi_k25",
            int4,
            {"text_config": {**TINY_CONFIGS["kimi_k25"][1]["text_config"], "moe_intermediate_size": 64}},
            id="Kimi-K2.5",
        ),
    ],
)
def test_published_precision(
    family: str, quantise: Callable[..., Quantised], changes: dict[str, object], tmp_path: Path
) -> None:
    source = save_tiny_model(family, tmp_path / "source", torch.bfloat16, **changes)
    block = {"quantization_config": {"quant_method": "fp8"}}
    config = json.loads((source / "config.json").read_text())
    nested = config.get("text_config")
    config = {**config, "text_config": {**nested, **block}} if nested else {**config, **block}
    (source / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors, decoded = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        stored = {name: tensor}
        if ".experts." in name and ".shared_experts." not in name:
            stored, decoded[name] = quantise(name, tuple(tensor.shape), generator)
        tensors |= stored
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})

    found = open_source(SourceReader(source))
    assert sum(found.decoded().values()) == len(decoded)
    assert {name for layer in found.layers for name in found.expected(layer)} == set(decoded)
    for name, expected in decoded.items():
        assert torch.equal(found.reader.get(name), expected)
    compress(source, tmp_path / "small", make_config(retain_ratio=1.0))
    verify(tmp_path / "small", source)
    restore(tmp_path / "small", tmp_path / "dense")
    dense = SourceReader(tmp_path / "dense")
    assert set(dense.names) == set(found.reader.names)
    assert "quantization_config" not in json.dumps(dense.config)
