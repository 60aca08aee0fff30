"""The format: the golden checkpoint, the SPEC's worked example and arithmetic, round trips, every refusal."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress_tools.errors import CheckpointError, FormatError, NumericalError
from compress_tools.format.codec import decode_bitmap, encode_bitmap, mask_row_counts, pack_mask, unpack_mask
from compress_tools.format.schema import ResMoEFormat, parse_format
from compress_tools.format.tensors import layer_bytes, layer_tensors, row_pointer_bytes
from compress_tools.resmoe_checkpoint import ResMoECheckpoint
from tests.compress_tools.golden.make import BLOCK, golden_tensors

GOLDEN = Path(__file__).parent / "golden" / "v1"


def block() -> dict[str, Any]:
    return {"quant_method": "resmoe", "format_version": 1, **copy.deepcopy(BLOCK)}


def test_golden_checkpoint_means_what_it_meant() -> None:
    checkpoint = ResMoECheckpoint(GOLDEN)
    for layer in (0, 1):
        checkpoint.check_values(layer)
    expert = checkpoint.expert(0, 1)
    assert expert["gate_proj"].tolist() == [[0, 1, 2, 3], [4, 5 + 205, 6, 7 + 207]]
    assert expert["down_proj"].tolist() == [[16, 17, 18, 19], [20, 21 + 221, 22, 23 + 223]]
    assert checkpoint.expert(1, 1)["up_proj"].tolist() == [[4, 6, 8, 10], [-8, -12, -16, -20]]


def test_golden_bytes_are_still_written() -> None:
    fmt = ResMoEFormat.model_validate(block())
    written = load_file(GOLDEN / "model.safetensors")
    for name, tensor in golden_tensors(fmt).items():
        assert torch.equal(written[name], tensor), name
        assert written[name].dtype == tensor.dtype
    assert json.loads((GOLDEN / "config.json").read_text())["quantization_config"] == fmt.model_dump(mode="json")


def test_worked_example_of_the_spec() -> None:
    fmt = parse_format(block())
    assert layer_bytes(fmt, 0) == 168
    assert row_pointer_bytes(fmt, 0) == 4 * 2 * 3 * 2
    tensors = layer_tensors(fmt, 0)
    assert tensors["model.layers.0.block_sparse_moe.experts.0.w1.resmoe_center"].nbytes == 16
    assert tensors["model.layers.0.block_sparse_moe.experts.1.w2.resmoe_mask"].shape == (2, 8)
    assert tensors["model.layers.0.block_sparse_moe.experts.1.w1.resmoe_values"].nbytes == 12
    keep = torch.tensor([[False, True, False, True]])
    assert pack_mask(keep).tolist() == [[10, 0, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("hidden", [1, 7, 8, 63, 64, 65, 200], ids=lambda n: f"H{n}")
def test_masks_round_trip(hidden: int) -> None:
    keep = torch.rand(5, hidden, generator=torch.Generator().manual_seed(hidden)) < 0.4
    mask = pack_mask(keep)
    assert mask.shape == (5, 8 * -(-hidden // 64))
    assert torch.equal(unpack_mask(mask, hidden), keep)
    assert torch.equal(mask_row_counts(mask), keep.sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bitmaps_round_trip(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = {p: torch.randn(6, 70, generator=generator).to(dtype).float() for p in ("gate_proj", "down_proj")}
    keep = {p: torch.rand(6, 70, generator=generator) < 0.3 for p in rows}
    decoded = decode_bitmap(tuple(rows), encode_bitmap(rows, keep, dtype), 70)
    for projection in rows:
        assert torch.equal(decoded[projection], rows[projection] * keep[projection])


def test_layers_may_have_names_of_their_own() -> None:
    content = block()
    content["names"]["expert"] = "{layer}.experts.{expert}"
    content["names"]["layers"] = {"0": "encoder.block.3", "1": "decoder.block.0"}
    names = {name.split(".experts")[0] for layer in (0, 1) for name in layer_tensors(parse_format(content), layer)}
    assert names == {"encoder.block.3", "decoder.block.0"}


def test_biases_are_stored_beside_every_projection() -> None:
    fmt = parse_format({**block(), "biases": True})
    tensors = layer_tensors(fmt, 0)
    assert tensors["model.layers.0.block_sparse_moe.experts.1.w3.resmoe_bias"].shape == (2,)
    assert tensors["model.layers.0.block_sparse_moe.experts.1.w2.resmoe_bias"].shape == (4,)
    assert layer_bytes(fmt, 0) == 168 + 2 * (2 + 2 + 4) * 2


def edit(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return apply


REFUSED_BLOCKS = {
    "unknown version": (edit("format_version", value=2), "format_version 2"),
    "no version": (edit("format_version", value=None), "format_version"),
    "other method": (edit("quant_method", value="gptq"), "quant_method"),
    "unknown key": (edit("colour", value=1), "colour"),
    "unknown key of a layer": (edit("layers", "0", "colour", value=1), "colour"),
    "unknown key of a part": (edit("layers", "0", "residual", 0, "colour", value=1), "colour"),
    "unknown part": (edit("layers", "0", "residual", 0, "method", value="magic"), "magic"),
    "no residual": (edit("layers", "0", "residual", value=[]), "residual"),
    "too many values": (edit("layers", "0", "residual", 0, "values_per_expert", value=25), "25"),
    "zero values": (edit("layers", "0", "residual", 0, "values_per_expert", value=0), "values_per_expert"),
    "too high a rank": (edit("layers", "1", "residual", 0, "rank", value=3), "rank 3"),
    "projection left out": (edit("layers", "1", "residual", 0, "projections", value=["gate_proj"]), "covers"),
    "negative layer": (edit("layers", "-1", value=BLOCK["layers"]["1"]), "negative"),
    "no placeholder": (edit("names", "expert", value="model.layers.0.experts"), "layer"),
    "unknown dtype": (edit("dtype", value="float8"), "dtype"),
}


@pytest.mark.parametrize("case", REFUSED_BLOCKS)
def test_refused_blocks(case: str) -> None:
    change, message = REFUSED_BLOCKS[case]
    content = block()
    change(content)
    with pytest.raises(FormatError, match=message):
        parse_format(content)


def test_a_part_twice_is_refused() -> None:
    content = block()
    content["layers"]["1"]["residual"] *= 2
    with pytest.raises(FormatError, match="twice"):
        parse_format(content)


MASK_NAME = "model.layers.0.block_sparse_moe.experts.1.w2.resmoe_mask"
VALUES_NAME = "model.layers.0.block_sparse_moe.experts.1.w1.resmoe_values"


def broken_copy(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(GOLDEN, path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda t: t.pop(MASK_NAME), "missing", id="missing"),
        pytest.param(lambda t: t.update({MASK_NAME: t[MASK_NAME][:1].clone()}), r"\[1, 8\]", id="shape"),
        pytest.param(lambda t: t.update({VALUES_NAME: t[VALUES_NAME].float()}), "F32", id="dtype"),
        pytest.param(lambda t: t.update({"model.x.resmoe_u": torch.ones(1)}), "does not name", id="extra"),
    ],
)
def test_checkpoints_that_disagree_with_their_config(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        ResMoECheckpoint(broken_copy(tmp_path / "broken", change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param(lambda t: t[VALUES_NAME].__setitem__(0, float("nan")), NumericalError, "NaN", id="nan"),
        pytest.param(lambda t: t[MASK_NAME].__setitem__((0, 7), 128), FormatError, "padding", id="padding"),
        pytest.param(lambda t: t[MASK_NAME].__setitem__((0, 0), 15), FormatError, "masks keep 10", id="bit count"),
    ],
)
def test_values_that_disagree_with_the_config(tmp_path: Path, change: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ResMoECheckpoint(broken_copy(tmp_path / "broken", change)).check_values(0)


def test_a_plain_checkpoint_is_not_resmoe(tiny_mixtral: Path) -> None:
    with pytest.raises(FormatError, match="no quantization_config"):
        ResMoECheckpoint(tiny_mixtral)
    with pytest.raises(CheckpointError, match="no such directory"):
        ResMoECheckpoint(tiny_mixtral / "nowhere")
