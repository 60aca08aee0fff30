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
from compress_tools.format.codec import decode_residual, restore_center
from compress_tools.format.packing import mask_row_counts, pack_codes, pack_mask, unpack_codes, unpack_mask
from compress_tools.format.parts.bitmap import encode_bitmap
from compress_tools.format.quantization import dequantize, expand_scales
from compress_tools.format.schema import PROJECTIONS, READABLE_VERSIONS, BitmapResidual, parse_format
from compress_tools.format.tensors import (
    group_map_bytes,
    layer_bytes,
    layer_params,
    layer_tensors,
    row_pointer_bytes,
)
from compress_tools.format.trellis_tables import TABLES
from compress_tools.stored.checkpoint import ResMoECheckpoint
from tests.compress_tools.format.golden import make
from tests.compress_tools.format.golden.make import BLOCK, BLOCK_2, KEPT_COLUMNS, golden_tensors, golden_tensors_2

GOLDEN = Path(__file__).parent / "golden" / "v1"
GOLDEN_2 = Path(__file__).parent / "golden" / "v2"
GOLDEN_3 = Path(__file__).parent / "golden" / "v3"


def block(version: int = 1) -> dict[str, Any]:
    return copy.deepcopy(make.block(version))


def test_golden_checkpoint_means_what_it_meant() -> None:
    checkpoint = ResMoECheckpoint(GOLDEN)
    for layer in (0, 1):
        checkpoint.check_values(layer)
    expert = checkpoint.expert(0, 1)
    assert expert["gate_proj"].tolist() == [[0, 1, 2, 3], [4, 5 + 205, 6, 7 + 207]]
    assert expert["down_proj"].tolist() == [[16, 17, 18, 19], [20, 21 + 221, 22, 23 + 223]]
    assert checkpoint.expert(1, 1)["up_proj"].tolist() == [[4, 6, 8, 10], [-8, -12, -16, -20]]


def test_golden_checkpoint_of_version_2_means_what_it_meant() -> None:
    checkpoint = ResMoECheckpoint(GOLDEN_2)
    for layer in (0, 1, 2):
        checkpoint.check_values(layer)
    # 4-bit center and 3-bit residual; the scale of columns 32.. is half that of the others
    expected = [-3.5, -2.5, -1.5, -0.5, -3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 0.5, 1.5, 2.5, 3.5]
    assert checkpoint.expert(0, 1)["gate_proj"][1, :16].tolist() == expected
    assert checkpoint.expert(0, 1)["gate_proj"][1, 32:].tolist() == [-1.75, -1.25, -0.75, -0.25]
    # 4-bit values, codes 13, 14, 15, 0, over a center of 0, 1, 2, ...
    columns = list(KEPT_COLUMNS)
    up = checkpoint.expert(1, 0)["up_proj"]
    assert up[0, columns].tolist() == [1 + 5.5 / 2, 3 + 6.5 / 2, 31 + 7.5 / 2, 34 - 7.5 / 4]
    assert up[0, 0] == 0
    assert up[1, 2] == 38
    # 8-bit values of equal rows: codes 28 to 31, whole-row scale 0.5
    down = checkpoint.expert(1, 2)["down_proj"]
    assert down[1, columns].tolist() == [-49.75, -49.25, -48.75, -48.25]
    assert int((down != 0).sum()) == 8
    # 2-bit codes 3, 0, 1, 2, ... at scale 0.5
    assert checkpoint.expert(1, 1)["down_proj"][0, :4].tolist() == [0.75, -0.75, -0.25, 0.25]
    # rank 2 by 8-bit factors, U codes 9, 10, V codes 11, 12, ..., all scales 0.5; and 2-bit codes 3, 0, ...
    row_of_u = (9 - 127.5) / 2 + (10 - 127.5) / 2
    expected = [row_of_u * (11 - 127.5) / 2 + 0.75, row_of_u * (12 - 127.5) / 2 - 0.75]
    assert checkpoint.expert(1, 1)["gate_proj"][0, :2].tolist() == expected
    assert checkpoint.expert(2, 2)["up_proj"][1, columns].tolist() == [-12, -11, -10, -9]


def test_golden_checkpoint_of_version_3_means_what_it_meant() -> None:
    """Levels spelled out from the tables, by hand: the newest symbol chooses in the first."""
    checkpoint = ResMoECheckpoint(GOLDEN_3)
    for layer in (0, 1, 3):
        checkpoint.check_values(layer)
    # 4 bits, whole rows; tensors count from their number on: each symbol is the one before it and 1
    four, center = checkpoint.stored(3, 1), checkpoint.shared(3)
    symbols = unpack_codes(four["gate_proj", "resmoe_trellis"], 4, 36)[1].tolist()
    assert symbols[:3] == [symbols[0], (symbols[0] + 1) % 16, (symbols[0] + 2) % 16]
    newest, second, third = TABLES[4]
    levels = [newest[symbols[0]] + second[0] + third[0], newest[symbols[1]] + second[symbols[0]] + third[0]]
    levels += [newest[symbols[c]] + second[symbols[c - 1]] + third[symbols[c - 2]] for c in range(2, 36)]
    restored = restore_center(checkpoint.fmt.layers[3], center, 36)
    found = checkpoint.expert(3, 1)["gate_proj"][1] - restored["gate_proj"][1]
    assert found.tolist() == [level / 2 for level in levels]


@pytest.mark.parametrize(("version", "tensors"), [(1, golden_tensors), (2, golden_tensors_2), (3, golden_tensors_2)])
def test_golden_bytes_are_still_written(version: int, tensors: Any) -> None:
    fmt = parse_format(block(version))
    folder = GOLDEN.parent / f"v{version}"
    written = load_file(folder / "model.safetensors")
    for name, tensor in tensors(fmt).items():
        assert torch.equal(written[name], tensor), name
        assert written[name].dtype == tensor.dtype
    assert json.loads((folder / "config.json").read_text())["quantization_config"] == fmt.model_dump(mode="json")


def test_every_version_has_a_golden_checkpoint() -> None:
    kept = {int(folder.name[1:]) for folder in GOLDEN.parent.glob("v[0-9]")}
    assert kept == set(READABLE_VERSIONS)


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


def test_second_worked_example_of_the_spec() -> None:
    content = block(2)
    content["hidden_size"], content["num_experts"] = 4, 2
    parts = [{"method": "quantized", "projections": PROJECTIONS, "bits": bits} for bits in (4, 3)]
    content["layers"] = {"0": {"center": parts[:1], "residual": parts[1:]}}
    fmt = parse_format(content)
    tensors = layer_tensors(fmt, 0)
    assert layer_bytes(fmt, 0) == 96
    assert row_pointer_bytes(fmt, 0) == group_map_bytes(fmt, 0) == 0
    assert tensors["model.layers.0.block_sparse_moe.experts.0.w1.resmoe_center_codes"].shape == (2, 4)
    assert tensors["model.layers.0.block_sparse_moe.experts.1.w1.resmoe_codes"].shape == (2, 3)
    codes = pack_codes(torch.tensor([[5, 0, 7, 2]], dtype=torch.uint8), 3)
    assert codes.tolist() == [[177, 0, 5]]
    assert dequantize(codes, torch.tensor([[0.5]]), 3, 4, None).tolist() == [[0.75, -1.75, 1.75, -0.75]]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_sizes_are_those_of_the_spec(layer: int) -> None:
    """Section 5, spelled out for the golden checkpoint of version 2: I 2, H 36, groups of 32."""
    sizes_p, size_i, size_h = 3, 2, 36
    code_row = {bits: bits * 5 for bits in (2, 3, 4, 8)}  # ceil(36 / 8) = 5
    quantized = {bits: size_i * (code_row[bits] + 2 * groups) for bits, groups in ((2, 1), (3, 2), (4, 2))}
    low_rank = size_i * (8 + 2) + 2 * 2 * (code_row[8] + 2)
    bitmap = 2 * size_i * (8 + 2 * 2) + 4 * 2
    expected = {
        0: sizes_p * quantized[4] + 3 * sizes_p * quantized[3],
        1: size_i * size_h * 2 + low_rank + sizes_p * quantized[2] + 2 * (bitmap + size_i * (8 + 8 + 2)),
        2: 3 * sizes_p * size_i * (8 + 4 * 2),
    }
    fmt = parse_format(block(2))
    assert layer_bytes(fmt, layer) == expected[layer]
    assert layer_bytes(fmt, layer) == sum(spec.nbytes for spec in layer_tensors(fmt, layer).values())
    assert row_pointer_bytes(fmt, layer) == {0: 0, 1: 4 * 2 * 2 * size_i, 2: 0}[layer]
    assert group_map_bytes(fmt, layer) == {0: 0, 1: 4 * 2 * 3, 2: 0}[layer]
    params = {
        0: 4 * 3 * size_i * size_h,
        1: size_i * size_h + 2 * (size_i + 2 * size_h) + 3 * size_i * size_h + 2 * (16 + size_i * 4),
        2: 3 * 3 * size_i * 4,
    }
    assert layer_params(fmt, layer) == params[layer]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 63, 65], ids=lambda n: f"N{n}")
def test_codes_round_trip(bits: int, columns: int) -> None:
    codes = torch.randint(2**bits, (5, columns), generator=torch.Generator().manual_seed(columns)).byte()
    packed = pack_codes(codes, bits)
    assert packed.shape == (5, bits * -(-columns // 8))
    assert torch.equal(unpack_codes(packed, bits, columns), codes)


@pytest.mark.parametrize("group_size", [None, 32], ids=lambda g: f"g{g}")
def test_scales_are_fp32_for_every_column(group_size: int | None) -> None:
    scales = torch.tensor([[0.5, 3.0]]) if group_size else torch.tensor([[0.5]])
    wide = expand_scales(scales.bfloat16(), 40, group_size)
    assert wide.dtype == torch.float32
    assert wide.expand(1, 40).tolist() == [[0.5] * 32 + [3.0] * 8 if group_size else [0.5] * 40]


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
    part = BitmapResidual(projections=tuple(rows), values_per_expert=sum(int(mask.sum()) for mask in keep.values()))
    decoded = part.decode(encode_bitmap(rows, keep, dtype), 70)
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
    "unknown version": (edit("format_version", value=4), "format_version 4"),
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


GROUPS = ("layers", "1", "groups")
REFUSED_BLOCKS_2 = {
    "unknown bits": (edit("layers", "0", "residual", 0, "bits", value=5), "bits"),
    "unknown bits of a center": (edit("layers", "0", "center", 0, "bits", value=16), "bits"),
    "unknown group size": (edit("layers", "0", "residual", 0, "group_size", value=48), "group_size"),
    "unknown value bits": (edit(*GROUPS, 1, "residual", 0, "value_bits", value=2), "value_bits"),
    "unknown factor bits": (edit(*GROUPS, 0, "residual", 0, "factor_bits", value=4), "factor_bits"),
    "groups of values without codes": (
        edit("layers", "2", "residual", 0, "group_size", value=32),
        "without value_bits",
    ),
    "more values than columns": (edit("layers", "2", "residual", 0, "values_per_row", value=37), "exceeds H = 36"),
    "an expert in two groups": (edit(*GROUPS, 0, "experts", value=[0, 1]), "in two groups"),
    "an expert left out": (edit(*GROUPS, 1, "experts", value=[0]), r"experts \[0, 1\], expected 0\.\.2"),
    "an expert too many": (edit(*GROUPS, 1, "experts", value=[0, 2, 3]), r"expected 0\.\.2"),
    "a group without experts": (edit(*GROUPS, 1, "experts", value=[]), "experts"),
    "a group's projection left out": (edit(*GROUPS, 0, "residual", 1, "projections", value=["gate_proj"]), "covers"),
    "no groups": (edit(*GROUPS, value=[]), "groups"),
    "residual and groups": (edit("layers", "0", "groups", value=BLOCK_2["layers"]["1"]["groups"]), "either"),
    "center twice": (
        edit("layers", "0", "center", value=[*BLOCK_2["layers"]["0"]["center"], *BLOCK["layers"]["0"]["center"]]),
        "twice by the center",
    ),
    "both bitmaps on a projection": (
        edit(*GROUPS, 1, "residual", 1, "projections", value=["up_proj", "down_proj"]),
        "twice by the same method",
    ),
    "unknown key of a group": (edit(*GROUPS, 0, "colour", value=1), "colour"),
}


@pytest.mark.parametrize("case", REFUSED_BLOCKS_2)
def test_refused_blocks_of_version_2(case: str) -> None:
    change, message = REFUSED_BLOCKS_2[case]
    content = block(2)
    change(content)
    with pytest.raises(FormatError, match=message):
        parse_format(content)


@pytest.mark.parametrize(
    ("keys", "value", "named"),
    [
        (("residual", 0, "value_bits"), 4, "value_bits"),
        (("residual", 0, "value_bits"), None, "value_bits"),
        (("residual",), [{"method": "quantized", "projections": PROJECTIONS, "bits": 4}], "quantized"),
        (("residual",), [{"method": "bitmap_rows", "projections": PROJECTIONS, "values_per_row": 1}], "bitmap_rows"),
        (("center",), [{"method": "quantized", "projections": PROJECTIONS, "bits": 4}], "quantized"),
        (("groups",), None, "groups"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_version_1_has_nothing_of_version_2(keys: tuple, value: Any, named: str) -> None:
    content = block(1)
    edit("layers", "0", *keys, value=value)(content)
    with pytest.raises(FormatError, match=f"layer 0: {named} needs format_version 2, this is 1"):
        parse_format(content)
    content["format_version"] = 2
    assert 0 in parse_format(content).layers


def test_blocks_of_version_1_are_read_as_version_2() -> None:
    assert parse_format(block(1)).layers == parse_format({**block(1), "format_version": 2}).layers


def test_an_expert_has_its_groups_residual() -> None:
    layer = parse_format(block(2)).layers[1]
    assert layer.of_expert(2).residual == layer.groups[1].residual
    assert layer.of_expert(2).center == layer.center
    with pytest.raises(FormatError, match="expert 3 is in no group"):
        layer.of_expert(3)
    with pytest.raises(ValueError, match="of_expert"):
        decode_residual(layer, {}, 36)


def test_a_part_twice_is_refused() -> None:
    content = block()
    content["layers"]["1"]["residual"] *= 2
    with pytest.raises(FormatError, match="twice"):
        parse_format(content)


MASK_NAME = "model.layers.0.block_sparse_moe.experts.1.w2.resmoe_mask"
VALUES_NAME = "model.layers.0.block_sparse_moe.experts.1.w1.resmoe_values"


def broken_copy(path: Path, change: Callable[[dict[str, torch.Tensor]], None], golden: Path = GOLDEN) -> Path:
    shutil.copytree(golden, path)
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


STEM_2 = "model.layers.{}.block_sparse_moe.experts.{}"


@pytest.mark.parametrize(
    ("layer", "expert", "tensor", "place", "value", "message"),
    [
        pytest.param(0, 1, "w3.resmoe_codes", (1, -1), 16, "padding codes", id="high plane of 3 bits"),
        pytest.param(0, 1, "w3.resmoe_codes", (1, 9), 1, "padding codes", id="low plane of 3 bits"),
        pytest.param(0, 0, "w3.resmoe_center_codes", (0, 19), 16, "padding codes", id="center"),
        pytest.param(1, 1, "w1.resmoe_u_codes", (0, 2), 1, "padding codes", id="factor"),
        pytest.param(1, 0, "w2.resmoe_row_value_codes", (0, 4), 1, "padding codes", id="values"),
        pytest.param(2, 0, "w2.resmoe_mask", (0, 0), 11, "a row keeps 5 values, the config says 4", id="row count"),
        pytest.param(0, 1, "w3.resmoe_scales", (1, 1), float("inf"), "NaN or Inf", id="scale"),
        pytest.param(0, 1, "w3.resmoe_scales", (1, 1), -0.5, "negative", id="negative scale"),
    ],
)
def test_values_of_version_2_that_disagree_with_the_config(
    tmp_path: Path, layer: int, expert: int, tensor: str, place: tuple, value: float, message: str
) -> None:
    name = f"{STEM_2.format(layer, expert)}.{tensor}"
    broken = broken_copy(tmp_path / "broken", lambda t: t[name].__setitem__(place, value), GOLDEN_2)
    with pytest.raises((FormatError, NumericalError), match=message):
        ResMoECheckpoint(broken).check_values(layer)


def test_rows_of_unequal_counts_are_not_restored(tmp_path: Path) -> None:
    name = f"{STEM_2.format(2, 0)}.w2.resmoe_mask"
    broken = broken_copy(tmp_path / "broken", lambda t: t[name].__setitem__((0, 0), 11), GOLDEN_2)
    with pytest.raises(FormatError, match="a row's mask keeps 5 values, 4 are stored"):
        ResMoECheckpoint(broken).expert(2, 0)


def test_a_plain_checkpoint_is_not_resmoe(tiny_mixtral: Path) -> None:
    with pytest.raises(FormatError, match="no quantization_config"):
        ResMoECheckpoint(tiny_mixtral)
    with pytest.raises(CheckpointError, match="no such directory"):
        ResMoECheckpoint(tiny_mixtral / "nowhere")
