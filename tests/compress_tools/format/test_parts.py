"""Every part of the union by the same laws: what it says of itself is what is stored, and every table has it."""

import json
import re
from math import prod
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from compress_tools.config import Method, make_config
from compress_tools.errors import FormatError
from compress_tools.format.dtypes import DTYPES
from compress_tools.format.packing import pack_mask
from compress_tools.format.parts.base import Part, PartSizes, StoredTensors, TensorSpec
from compress_tools.format.schema import (
    FORMAT_VERSION,
    READABLE_VERSIONS,
    BitmapResidual,
    DenseCenter,
    ExpertNames,
    LayerSpec,
    LowRankResidual,
    QuantizedCenter,
    QuantizedResidual,
    ResMoEFormat,
    RowBitmapResidual,
    TrellisCenter,
    TrellisResidual,
    part_classes,
)
from compress_tools.format.tensors import BIAS, ROLES, follows_model_dtype, is_resmoe_name
from compress_tools.residuals.recipes import RECIPES
from compress_tools.residuals.registry import ENCODERS
from compress_tools.source.design_matrix import design_to_rows

REPO = Path(__file__).resolve().parents[3]
PAGE = REPO / "docs" / "adding-a-coder.md"
SPEC = REPO / "compress_tools" / "format" / "SPEC.md"

# No size is a multiple of 8, so that every tensor of codes and every mask has padding.
SIZES = PartSizes(intermediate_size=6, hidden_size=70, dtype="bfloat16")
JOINT = ("gate_proj", "up_proj", "down_proj")
TWO = ("down_proj", "gate_proj")
# Every form of every part.
EXAMPLES: tuple[Part, ...] = (
    DenseCenter(projections=TWO),
    QuantizedCenter(projections=("up_proj",), bits=4),
    QuantizedCenter(projections=JOINT, bits=3, group_size=32),
    QuantizedResidual(projections=TWO, bits=2),
    QuantizedResidual(projections=JOINT, bits=3, group_size=64),
    QuantizedResidual(projections=JOINT, bits=4, group_size=128),
    QuantizedResidual(projections=("down_proj",), bits=8, group_size=32),
    BitmapResidual(projections=JOINT, values_per_expert=389),
    BitmapResidual(projections=TWO, values_per_expert=387, value_bits=4, group_size=32),
    BitmapResidual(projections=("gate_proj",), values_per_expert=101, value_bits=8),
    RowBitmapResidual(projections=JOINT, values_per_row=23),
    RowBitmapResidual(projections=TWO, values_per_row=37, value_bits=4),
    RowBitmapResidual(projections=("up_proj",), values_per_row=37, value_bits=8, group_size=64),
    LowRankResidual(projections=JOINT, rank=5),
    LowRankResidual(projections=("down_proj",), rank=3),
    LowRankResidual(projections=TWO, rank=5, factor_bits=8),
    TrellisCenter(projections=TWO, bits=4),
    TrellisCenter(projections=JOINT, bits=2, group_size=32),
    TrellisResidual(projections=TWO, bits=1),
    TrellisResidual(projections=JOINT, bits=2, group_size=64),
    TrellisResidual(projections=JOINT, bits=3),
    TrellisResidual(projections=("down_proj",), bits=4, group_size=128),
)
each_example = pytest.mark.parametrize("part", EXAMPLES, ids=lambda part: f"{type(part).__name__}-{part.describe()}")
each_class = pytest.mark.parametrize("cls", part_classes(), ids=lambda cls: cls.__name__)


def design(part: Part) -> torch.Tensor:
    """``[I, P*H]``, of the part's projections."""
    columns = len(part.projections) * SIZES.hidden_size
    return torch.randn(SIZES.intermediate_size, columns, generator=torch.Generator().manual_seed(5))


def stored_by(part: Part, encoder: Any = None) -> StoredTensors:
    encode = encoder or ENCODERS[type(part)]
    return encode(design(part), part, DTYPES[SIZES.dtype], 0)


def specs_of(part: Part) -> dict[tuple[str, str], TensorSpec]:
    return {(spec.projection, spec.suffix): spec for spec in part.tensors(SIZES)}


def check_laws(part: Part, stored: StoredTensors) -> None:
    """What holds for whatever an encoder makes of a part."""
    specs = specs_of(part)
    assert {key: (tuple(t.shape), t.dtype) for key, t in stored.items()} == {
        key: (spec.shape, DTYPES[spec.dtype]) for key, spec in specs.items()
    }
    assert {projection for projection, _ in specs} <= set(part.projections)
    assert {suffix: spec.role for (_, suffix), spec in specs.items()}.items() <= part.roles.items()
    assert all(spec.codes == (1, SIZES.hidden_size) for spec in specs.values() if spec.role == "mask")
    kinds = {"values": SIZES.dtype, "codes": "uint8", "symbols": "uint8", "scales": "bfloat16", "mask": "uint8"}
    assert all(spec.dtype == kinds[spec.role] for spec in specs.values())
    assert sum(spec.nbytes for spec in specs.values()) == sum(t.numel() * t.itemsize for t in stored.values())

    counted = 0
    for spec in specs.values():
        if spec.role == "values":
            counted += prod(spec.shape)
        elif spec.role in ("codes", "symbols"):
            counted += prod(spec.shape[:-1]) * spec.codes[1]
    assert part.params(SIZES) == counted

    for key, spec in specs.items():
        assert spec.number_fault(stored[key], torch.float32) is None
        assert spec.padding_fault(stored[key]) is None
    assert part.stored_fault(stored) is None
    assert part.size_fault(SIZES) is None

    rows = part.decode(stored, SIZES.hidden_size)
    assert tuple(rows) == part.projections
    error = energy = 0.0
    for projection, own in design_to_rows(design(part), part.projections).items():
        assert rows[projection].dtype == torch.float32
        error += float((rows[projection] - own).square().sum())
        energy += float(own.square().sum())
    assert error < 0.7 * energy
    narrow = part.decode(stored, SIZES.hidden_size, torch.bfloat16)
    assert all(torch.equal(narrow[projection], own.bfloat16()) for projection, own in rows.items())

    assert part.describe() == part.describe().strip() != ""
    assert type(part).model_validate(json.loads(part.model_dump_json())) == part
    assert part.newer_than(part.since - 1) == (part.method, part.since)


@each_example
def test_what_a_part_says_of_itself_is_what_is_stored(part: Part) -> None:
    check_laws(part, stored_by(part))
    assert part.newer_than(READABLE_VERSIONS[-1]) is None
    assert (part.newer_than(FORMAT_VERSION) is None) == (part.since <= FORMAT_VERSION)


@each_class
def test_every_part_is_in_every_table(cls: type[Part]) -> None:
    own = [part for part in EXAMPLES if type(part) is cls]
    assert cls in ENCODERS
    assert cls.since in READABLE_VERSIONS
    assert {part.kernel_coder for part in own} - {None} == set(cls.kernel_coders)
    if len(cls.kernel_coders) > 1:  # plain, and in codes
        for part in own:
            in_codes = any(spec.role == "codes" for spec in part.tensors(SIZES))
            assert part.kernel_coder == part.method + ("_codes" if in_codes else "")
    stored = {spec.suffix for part in own for spec in part.tensors(SIZES)}
    assert stored == set(cls.roles)
    assert all(ROLES[suffix] == role for suffix, role in cls.roles.items())


def test_no_table_has_more() -> None:
    assert set(ENCODERS) == set(part_classes())
    assert set(RECIPES) == set(get_args(Method))
    assert set(ROLES) == {BIAS} | {suffix for cls in part_classes() for suffix in cls.roles}


def test_no_two_forms_read_alike() -> None:
    words = [part.describe() for part in EXAMPLES]
    assert len(set(words)) == len(words)


def test_suffixes_decide_what_a_tensor_is() -> None:
    values = {BIAS} | {suffix for cls in part_classes() for suffix, role in cls.roles.items() if role == "values"}
    assert {suffix for suffix in ROLES if follows_model_dtype(suffix)} == values
    assert all(is_resmoe_name(f"model.layers.0.mlp.experts.3.up_proj.{suffix}") for suffix in ROLES)
    assert not is_resmoe_name("model.layers.0.mlp.experts.3.up_proj.weight")
    assert not is_resmoe_name("model.resmoe_codes.weight")
    assert not follows_model_dtype("weight")


def sections() -> dict[str, str]:
    """SPEC.md's sections by number."""
    found = re.split(r"^## (\d)\..*$", SPEC.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


@each_class
def test_every_part_is_in_the_spec(cls: type[Part]) -> None:
    text, method = sections(), cls.model_fields["method"].default
    place = "center" if cls.__name__.endswith("Center") else "residual"
    (row,) = re.findall(rf"^\| `{method}`(?: \((\d)\))? \| {place} \| (.*) \|$", text["2"], flags=re.MULTILINE)
    later, keys = row
    assert int(later or 1) == cls.since
    own = set(cls.model_fields) - {"method", "projections"}
    assert {key for key in own if f"`{key}`" in keys} == own
    for suffix in cls.roles:
        star = r"( \*)?"
        assert len(re.findall(rf"^\| `{suffix}`{star} \| ", text["3"], flags=re.MULTILINE)) == 1
    assert f"`{method}`" in text["4"] or method == "dense"
    named = f"- {place if place == 'center' else method}: "
    assert sum(line.startswith(named) for line in text["5"].splitlines()) == 1


def test_the_spec_has_the_roles_dtypes() -> None:
    """The last column of section 3 is what a tensor's role says."""
    kinds = {"values": "`dtype`", "codes": "uint8", "symbols": "uint8", "scales": "bfloat16", "mask": "uint8"}
    rows = re.findall(r"^\| `(resmoe_\w+)`(?: \*)? \|.* \| ([^|]+) \|$", sections()["3"], flags=re.MULTILINE)
    assert dict(rows) == {suffix: kinds[role] for suffix, role in ROLES.items()}


def test_only_what_has_rows_is_sliced_by_rows() -> None:
    """SPEC.md, 3: the tensors marked * and no others have I first."""
    marked = set(re.findall(r"^\| `(resmoe_\w+)` \* \|", sections()["3"], flags=re.MULTILINE))
    by_rows = {s.suffix for part in EXAMPLES for s in part.tensors(SIZES) if s.shape[0] == SIZES.intermediate_size}
    assert marked == by_rows


LIMITS = [
    (BitmapResidual, "values_per_expert", 2 * 6 * 70, "exceeds the 840 weights"),
    (RowBitmapResidual, "values_per_row", 70, "exceeds H = 70"),
    (LowRankResidual, "rank", 6, r"exceeds min\(I, columns\) = 6"),
]


@pytest.mark.parametrize(("cls", "key", "most", "message"), LIMITS, ids=[cls.__name__ for cls, *_ in LIMITS])
def test_a_key_may_reach_its_limit_and_not_pass_it(cls: type[Part], key: str, most: int, message: str) -> None:
    assert cls(projections=TWO, **{key: most}).size_fault(SIZES) is None
    assert re.search(f"{key} {most + 1} {message}", cls(projections=TWO, **{key: most + 1}).size_fault(SIZES))


def test_a_rank_may_not_pass_the_columns_of_its_own_projections() -> None:
    tall = PartSizes(intermediate_size=50, hidden_size=7, dtype="float32")
    assert LowRankResidual(projections=TWO, rank=14).size_fault(tall) is None
    assert "= 14" in LowRankResidual(projections=TWO, rank=15).size_fault(tall)
    assert "= 7" in LowRankResidual(projections=TWO[:1], rank=8).size_fault(tall)


@each_example
def test_padding_and_negative_scales_are_found(part: Part) -> None:
    """Whatever lies behind the last column is looked at; what lies at it may be anything."""
    stored, checked = stored_by(part), 0
    for key, spec in specs_of(part).items():
        broken = stored[key].clone()
        if spec.role == "scales":
            broken[-1, -1] = -1e-30
            assert "negative scale -9.98e-31, expected none below zero" in spec.number_fault(broken, torch.float32)
        elif spec.role == "mask":
            last = spec.codes[1] - 1
            broken[-1, last // 8] ^= 1 << last % 8
            assert spec.padding_fault(broken) is None
            broken[-1, (last + 1) // 8] |= 1 << (last + 1) % 8
            assert f"padding bits after column {last}" in spec.padding_fault(broken)
        elif spec.role == "symbols":
            assert spec.padding_fault(broken ^ 255) is None  # what fills a row up belongs to it
        elif spec.role == "codes":
            flat = broken.flatten()
            flat[-1] ^= 1 << 7
            padded = spec.codes[1] % 8 != 0
            assert (spec.padding_fault(flat.view_as(broken)) is not None) == padded
        else:
            broken.fill_(-3)
            assert spec.padding_fault(broken) is None
            continue
        checked += 1
    assert checked == sum(spec.role != "values" for spec in specs_of(part).values())


MASKED = [part for part in EXAMPLES if "mask" in part.roles.values()]


@pytest.mark.parametrize("part", MASKED, ids=lambda part: part.describe())
def test_masks_that_contradict_the_counts_are_found(part: Part) -> None:
    for change in (0, 1):  # a bit more, a bit less
        stored = stored_by(part)
        mask = stored[part.projections[-1], "resmoe_mask"]
        row, byte = next((r, b) for r in range(5, -1, -1) for b in range(8) if mask[r, b] not in (0, 255))
        bit = next(b for b in range(8) if (int(mask[row, byte]) >> b & 1) == change)
        mask[row, byte] ^= 1 << bit
        assert re.search(r"keeps? \d+ values, the config says \d+", part.stored_fault(stored))
        with pytest.raises(FormatError, match=r"keeps? \d+ values, \d+ are stored"):
            part.decode(stored, SIZES.hidden_size)


def test_the_first_row_that_contradicts_is_named() -> None:
    part = RowBitmapResidual(projections=("up_proj",), values_per_row=2)
    keep = torch.zeros(4, 70, dtype=torch.bool)
    for row, count in enumerate((2, 5, 7, 2)):
        keep[row, :count] = True
    assert part.wrong_count(pack_mask(keep)) == 5
    assert part.wrong_count(pack_mask(keep[::3])) is None


@pytest.mark.parametrize("part", MASKED, ids=lambda part: part.describe())
def test_example_masks_fit_and_are_spread(part: Part) -> None:
    masks = part.example_masks(SIZES)
    assert set(masks) == {(projection, "resmoe_mask") for projection in part.projections}
    stored = stored_by(part) | masks
    assert part.stored_fault(stored) is None
    assert all(specs_of(part)[key].padding_fault(mask) is None for key, mask in masks.items())
    rows = {p: rows != 0 for p, rows in part.decode(stored, SIZES.hidden_size).items()}
    by_row = torch.cat([kept.sum(1) for kept in rows.values()])
    assert int(by_row.max() - by_row.min()) <= 1


def test_without_masks_there_are_no_example_masks() -> None:
    unmasked = [part for part in EXAMPLES if part not in MASKED]
    assert [part.example_masks(SIZES) for part in unmasked] == [{}] * len(unmasked)
    assert len(unmasked) == 16


@each_example
def test_row_pointers_are_counted_where_rows_differ(part: Part) -> None:
    expected = 4 * len(part.projections) * 6 if isinstance(part, BitmapResidual) else 0
    assert part.row_pointer_bytes(SIZES) == expected


WORDS = {
    "dense center": EXAMPLES[0],
    "4-bit center": EXAMPLES[1],
    "3-bit by 32 center": EXAMPLES[2],
    "quantized (2-bit, joint)": EXAMPLES[3],
    "quantized (8-bit by 32, down_proj)": EXAMPLES[6],
    "bitmap (389 values, joint)": EXAMPLES[7],
    "bitmap (387 values, 4-bit by 32, joint)": EXAMPLES[8],
    "bitmap_rows (23 values in every row, joint)": EXAMPLES[10],
    "bitmap_rows (37 values in every row, 8-bit by 64, up_proj)": EXAMPLES[12],
    "low_rank (rank 3, down_proj)": EXAMPLES[14],
    "low_rank (rank 5, 8-bit factors, joint)": EXAMPLES[15],
    "2-bit by 32 trellis center": EXAMPLES[17],
    "trellis (1-bit, joint)": EXAMPLES[18],
    "trellis (4-bit by 128, down_proj)": EXAMPLES[21],
}


@pytest.mark.parametrize("words", WORDS)
def test_words(words: str) -> None:
    assert WORDS[words].describe() == words


OVERLAPS = [
    (BitmapResidual(projections=TWO, values_per_expert=5), RowBitmapResidual(projections=TWO[:1], values_per_row=2)),
    (QuantizedResidual(projections=JOINT, bits=2), QuantizedResidual(projections=("up_proj",), bits=8)),
    (LowRankResidual(projections=TWO, rank=2), LowRankResidual(projections=TWO[1:], rank=2, factor_bits=8)),
]


@pytest.mark.parametrize("parts", OVERLAPS, ids=lambda parts: "+".join(part.method for part in parts))
def test_tensors_of_the_same_name_are_refused(parts: tuple[Part, Part]) -> None:
    rest = QuantizedResidual(projections=JOINT, bits=4)
    with pytest.raises(ValueError, match="covered twice by the same method"):
        LayerSpec(center=(), residual=parts)
    apart = (parts[0], LowRankResidual(projections=("up_proj",), rank=1), rest)
    if not isinstance(parts[0], QuantizedResidual):
        assert LayerSpec(center=(), residual=apart).projections == JOINT


def test_the_pages_example_obeys_the_laws() -> None:
    """The two blocks of docs/adding-a-coder.md are all that a coder consists of."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    (part,) = names["sign_parts"](make_config(), JOINT, 6, 70)
    check_laws(part, stored_by(part, names["encode_signs"]))
    assert part.describe() == "sign (signs, joint)"
    assert part.kernel_coder == "sign"
    assert sum(spec.nbytes for spec in part.tensors(SIZES)) == 3 * 6 * (9 + 2)


def test_the_page_names_every_place() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.split("## A worked example")[0].splitlines() if line.startswith("| `")]
    places = [place for row in rows for place in re.findall(r"`([\w/.]+)`", row)]
    assert len(places) >= 15
    for place in places:
        if "CODER" not in place:
            assert (REPO / place).exists(), place
    # No other file spells a class that nothing else has a reason to know.
    spelled = {
        str(path.relative_to(REPO))
        for package in ("compress_tools", "resmoe_vllm")
        for path in (REPO / package).rglob("*.py")
        if re.search(r"\bRowBitmapResidual\b", path.read_text(encoding="utf-8"))
    }
    coder_files = {"compress_tools/format/parts/bitmap.py", "compress_tools/residuals/prune.py"}
    assert spelled - coder_files <= set(places)


def test_a_version_names_the_newest_key() -> None:
    part = BitmapResidual(projections=TWO, values_per_expert=9, value_bits=4, group_size=32)
    assert part.newer_than(1) == ("group_size", 2)
    assert BitmapResidual(projections=TWO, values_per_expert=9).newer_than(1) is None
    assert LowRankResidual(projections=TWO, rank=2, factor_bits=8).newer_than(1) == ("factor_bits", 2)
    names = ExpertNames(expert="{layer}.{expert}", projections={name: name for name in TWO})
    layer = {"center": [], "residual": [part.model_dump()]}
    fields = {"written_by": "tests", "dtype": "float32", "num_experts": 1, "hidden_size": 70, "intermediate_size": 6}
    with pytest.raises(ValueError, match="layer 3: group_size needs format_version 2, this is 1"):
        ResMoEFormat(**fields, names=names, layers={3: layer}, format_version=1)
    assert ResMoEFormat(**fields, names=names, layers={3: layer}).format_version == FORMAT_VERSION == 2
