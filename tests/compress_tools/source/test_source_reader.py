"""A quantised source compresses to the bytes that its decoded twin compresses to."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress_tools.config import make_config
from compress_tools.errors import CheckpointError
from compress_tools.pipeline import compress
from compress_tools.source.source_reader import SourceReader
from compress_tools.stored.verify import verify

Quantise = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]


def fp8_blocks(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """DeepSeek's: blocks of 128 x 128, ``weight_scale_inv``. Returns what is stored, and what it means."""
    scale = weight.float().abs().max() / 448
    stored = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {name: stored, f"{name}_scale_inv": scale.reshape(1, 1)}, (stored.float() * scale).bfloat16()


def fp8_rows(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """compressed-tensors': a scale a row, and the scale of its activations."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).bfloat16()
    stored = (weight.float() / scale.float()).to(torch.float8_e4m3fn)
    parts = {name: stored, f"{name}_scale": scale, name.replace("weight", "input_scale"): torch.ones(1)}
    return parts, (stored.float() * scale.float()).bfloat16()


def int4_groups(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Kimi-K2-Thinking's: packed int4 in groups of 8 columns (32 in the real one)."""
    grouped = weight.float().unflatten(1, (-1, 8))
    scale = (grouped.abs().amax(-1) / 7).bfloat16()
    levels = (grouped / scale.float()[..., None]).round().clamp(-8, 7).flatten(1)
    shifted = (levels + 8).to(torch.int64).unflatten(1, (-1, 8))
    packed = (shifted << torch.arange(0, 32, 4)).sum(-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).int()
    parts = {f"{name}_packed": packed, f"{name}_scale": scale, f"{name}_shape": torch.tensor(weight.shape)}
    return parts, (levels * scale.float().repeat_interleave(8, 1)).bfloat16()


def written(folder: Path, source: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    shutil.copytree(source, folder)
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    content = json.loads((source / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def twins(source: Path, folder: Path, quantise: Quantise, which: str, **config: object) -> tuple[Path, Path]:
    """(quantised, decoded): two checkpoints that mean the same."""
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if which in name and tensor.dim() == 2 and "embed" not in name and "lm_head" not in name:
            parts, meant[name] = quantise(name, tensor)
            stored |= parts
        else:
            stored[name] = meant[name] = tensor
    return written(folder / "quantised", source, stored, **config), written(folder / "decoded", source, meant)


@pytest.mark.parametrize(
    ("quantise", "which", "config"),
    [
        (fp8_blocks, "weight", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}),
        (fp8_blocks, "experts", {}),
        (fp8_rows, "proj", {"quantization_config": {"quant_method": "compressed-tensors"}}),
        (int4_groups, "experts", {"quantization_config": {"quant_method": "compressed-tensors"}}),
    ],
    ids=["fp8 everywhere", "fp8 experts, no block", "fp8 rows and activations", "int4 experts"],
)
def test_it_compresses_to_what_its_decoded_twin_does(
    tiny_mixtral_bf16: Path, tmp_path: Path, quantise: Quantise, which: str, config: dict[str, object]
):
    quantised, decoded = twins(tiny_mixtral_bf16, tmp_path, quantise, which, **config)
    found = compress(quantised, tmp_path / "a", make_config(workers=1))
    expected = compress(decoded, tmp_path / "b", make_config(workers=1))
    assert found.shards == expected.shards
    assert sum(found.decoded.values()) > 0
    assert not expected.decoded
    assert json.loads((tmp_path / "a/resmoe_report.json").read_text())["decoded"] == found.decoded
    assert json.loads((tmp_path / "a/config.json").read_text())["quantization_config"]["quant_method"] == "resmoe"
    # The error is against the decoded source, whichever of the two is asked.
    for source in (quantised, decoded):
        for verdict in verify(tmp_path / "a", source):
            assert verdict.relative_error == pytest.approx(verdict.reported_relative_error, rel=1e-3)


def test_what_is_left_out_is_named(tiny_mixtral_bf16: Path, tmp_path: Path):
    quantised, _ = twins(tiny_mixtral_bf16, tmp_path, fp8_rows, "experts")
    (quantised / "hf_quant_config.json").write_text("{}")
    report = compress(quantised, tmp_path / "small", make_config(workers=1))
    assert len(report.left_out) == 3 * 4 * 3 + 1
    assert all("activations" in why or "quantisation" in why for why in report.left_out.values())
    assert not (tmp_path / "small/hf_quant_config.json").exists()


@pytest.mark.parametrize("block", [None, {"quant_method": "fp8", "weight_block_size": [128, 128]}])
def test_a_block_that_says_what_is_not_there_is_seen_through(
    tiny_mixtral_bf16: Path, tmp_path: Path, block: dict[str, object] | None
):
    source = written(
        tmp_path / "source",
        tiny_mixtral_bf16,
        load_file(tiny_mixtral_bf16 / "model.safetensors"),
        quantization_config=block,
    )
    found = compress(source, tmp_path / "a", make_config(workers=1))
    expected = compress(tiny_mixtral_bf16, tmp_path / "b", make_config(workers=1))
    assert found.shards == expected.shards
    assert not found.decoded


def test_our_own_checkpoint_is_no_source(tiny_mixtral_bf16: Path, tmp_path: Path):
    compress(tiny_mixtral_bf16, tmp_path / "small", make_config(workers=1))
    with pytest.raises(CheckpointError, match="is a ResMoE checkpoint already"):
        SourceReader(tmp_path / "small")


def test_values_without_scales_are_refused(tiny_mixtral_bf16: Path, tmp_path: Path):
    tensors = load_file(tiny_mixtral_bf16 / "model.safetensors")
    name = next(name for name in tensors if "experts" in name)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="without a scale beside it"):
        SourceReader(written(tmp_path / "source", tiny_mixtral_bf16, tensors))
