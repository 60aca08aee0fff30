"""Matrices in codes by row: half a step at most, rows of every size, the golden checkpoint, every refusal."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress_tools.errors import FormatError
from compress_tools.format import rest
from compress_tools.format.rest import decode_rows, encode_rows, row_bytes, row_names, rows_fault
from compress_tools.format.schema import CodedRest, parse_format, version_for
from compress_tools.stored.checkpoint import ResMoECheckpoint
from tests.compress_tools.format.golden.make import REST, block_rest, golden_tensors_2, rest_tensors
from tests.compress_tools.format.test_format import broken_copy

CODES, SCALES = row_names("lm_head.weight")


def half_steps(weight: torch.Tensor) -> torch.Tensor:
    """How far each value is off, in steps of its row."""
    codes, scales = encode_rows(weight)
    assert rows_fault(codes, scales) is None
    step = scales.double()
    off = (codes.double() * step - weight.double()).abs()
    return torch.where(step > 0, off / step, off)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 33), (5, 4096)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_value_is_within_half_a_step(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    # fp32's rounding of the quotient
    assert half_steps(weight).max() <= 0.5 + 1e-5


@pytest.mark.parametrize("magnitude", [3e38, 1e30, 1e-30, 1e-38, 3e-39, 1e-40, 1e-44], ids=str)
def test_rows_of_extreme_size(magnitude: float) -> None:
    """Down to the smallest numbers there are, whose scale is not a number of eight bits any more."""
    weight = torch.randn(8, 50, generator=torch.Generator().manual_seed(1)).clamp(-1, 1) * magnitude
    codes, scales = encode_rows(weight)
    assert rows_fault(codes, scales) is None
    smallest = 2.0**-133  # the smallest bfloat16
    allowed = (0.5 * scales.double()).clamp(min=64 * smallest)
    assert ((codes.double() * scales.double() - weight.double()).abs() <= allowed).all()


def test_rows_of_zeros_are_restored_as_zeros() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    weight[2] = 0
    codes, scales = encode_rows(weight)
    assert scales[2] == 0
    assert not codes[2].any()
    assert not decode_rows(codes, scales, torch.float32)[2].any()


def test_signs_are_mirrored() -> None:
    weight = torch.randn(9, 40, generator=torch.Generator().manual_seed(3))
    codes, scales = encode_rows(weight)
    mirrored, same = encode_rows(-weight)
    assert torch.equal(mirrored, -codes)
    assert torch.equal(same, scales)


def test_rows_are_coded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands beside them, and however many are coded at a time."""
    weight = torch.randn(30, 17, generator=torch.Generator().manual_seed(4))
    codes, scales = encode_rows(weight)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))
    decoded = decode_rows(codes, scales, torch.bfloat16)
    monkeypatch.setattr(rest, "_CHUNK", 50)
    assert torch.equal(encode_rows(weight[order])[0], codes[order])
    assert torch.equal(decode_rows(codes, scales, torch.bfloat16), decoded)


def test_coding_what_was_decoded_changes_nothing() -> None:
    codes, scales = encode_rows(torch.randn(40, 64, generator=torch.Generator().manual_seed(6)))
    again, same = encode_rows(decode_rows(codes, scales, torch.float32))
    assert torch.equal(again, codes)
    assert torch.equal(same, scales)


def test_worked_example_of_the_spec() -> None:
    codes, scales = encode_rows(torch.tensor([[63.5, -1, 0.25, 0.2], [0, 0, 0, 0]]))
    assert codes.tolist() == [[127, -2, 0, 0], [0, 0, 0, 0]]
    assert scales.tolist() == [[0.5], [0]]
    assert row_bytes((2, 4)) == 12


def test_golden_checkpoint_with_a_coded_rest_means_what_it_meant() -> None:
    checkpoint = ResMoECheckpoint(REST)
    checkpoint.check_values(3)
    checkpoint.check_rows("lm_head.weight")
    assert checkpoint.plain_names == ["lm_head.weight"]
    assert checkpoint.plain_bytes("lm_head.weight") == 24
    assert checkpoint.plain("lm_head.weight").tolist() == [[63.5, -1, 0, 0.5], [0, 0, 0, 0], [-254, 6, -8, 10]]


def test_golden_bytes_are_still_written() -> None:
    fmt = parse_format(block_rest())
    written = load_file(REST / "model.safetensors")
    made = golden_tensors_2(fmt) | rest_tensors()
    assert set(written) == set(made)
    for name, tensor in made.items():
        assert torch.equal(written[name], tensor), name
    assert json.loads((REST / "config.json").read_text())["quantization_config"] == fmt.model_dump(mode="json")


def test_the_version_that_has_it() -> None:
    assert version_for([], {}) == 2
    assert version_for([], {}, CodedRest(bits=8, tensors=("a.weight",))) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 4}, "rest.bits"),
        ({"tensors": []}, "rest.tensors"),
        ({"tensors": ["a.weight", "a.weight"]}, "names a tensor twice"),
        ({"tensors": ["a.bias"]}, "expected names that end in .weight, found 'a.bias'"),
        ({"group_size": 32}, "rest.group_size"),
    ],
    ids=str,
)
def test_refused_blocks(change: dict[str, Any], message: str) -> None:
    block = block_rest()
    parse_format(block)
    block["rest"] = {**block["rest"], **change}
    with pytest.raises(FormatError, match=message):
        parse_format(block)


def test_an_earlier_version_has_none() -> None:
    block = copy.deepcopy(block_rest())
    block["format_version"] = 2
    with pytest.raises(FormatError, match="rest needs format_version 3, this is 2"):
        parse_format(block)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(CODES), f"tensor '{CODES}' is missing"),
        (lambda t: t.pop(SCALES), f"tensor '{SCALES}' is missing"),
        (lambda t: t.update({CODES: t[CODES].to(torch.uint8)}), f"'{CODES}' is U8 .3, 4., expected I8"),
        (lambda t: t.update({CODES: t[CODES][0].clone()}), "expected two dimensions"),
        (lambda t: t.update({SCALES: t[SCALES].flatten()}), f"'{SCALES}' is BF16 .3., expected BF16 .3, 1."),
        (lambda t: t.update({SCALES: t[SCALES].float()}), f"'{SCALES}' is F32"),
        (lambda t: t.update({"lm_head.weight": torch.ones(3, 4)}), "'lm_head.weight' is there beside its codes"),
        (lambda t: t.update({"x.resmoe_row_codes": t[CODES].clone()}), "1 tensors that the config does not name"),
    ],
    ids=["codes", "scales", "unsigned", "vector", "flat", "fp32", "both", "unnamed"],
)
def test_checkpoints_that_disagree_with_their_config(tmp_path: Path, change: Any, message: str) -> None:
    path = broken_copy(tmp_path / "broken", change, REST)
    with pytest.raises(FormatError, match=message):
        ResMoECheckpoint(path)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        (CODES, (0, 0), -128, "holds the code -128, expected -127 to 127"),
        (CODES, (1, 2), 1, "holds codes in a row whose scale is 0"),
        (SCALES, (2, 0), -2.0, "holds a scale that is negative, NaN or infinite"),
        (SCALES, (2, 0), float("nan"), "holds a scale that is negative, NaN or infinite"),
        (SCALES, (0, 0), float("inf"), "holds a scale that is negative, NaN or infinite"),
    ],
)
def test_values_that_are_forbidden(tmp_path: Path, name: str, place: Any, value: float, message: str) -> None:
    path = broken_copy(tmp_path / "broken", lambda tensors: tensors[name].__setitem__(place, value), REST)
    with pytest.raises(FormatError, match=f"'lm_head.weight' in codes {message}"):
        ResMoECheckpoint(path).check_rows("lm_head.weight")
