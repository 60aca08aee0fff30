"""The format at its limits: the largest counts, ranks and names that are allowed, and what lies one beyond."""

from typing import Any

import pytest

from compress_tools.errors import FormatError
from compress_tools.format.row_sizes import code_row_bytes, mask_row_bytes, num_groups
from compress_tools.format.schema import PROJECTIONS, ResMoEFormat, parse_format
from compress_tools.format.tensors import (
    dense_layer_bytes,
    group_map_bytes,
    is_resmoe_name,
    layer_bytes,
    layer_params,
    layer_tensors,
    row_pointer_bytes,
)

# Every size another, so that no two can be confused.
SIZE_E, SIZE_I, SIZE_H = 5, 3, 70
GATE, UP, DOWN = PROJECTIONS


def fmt_of(residual: list[dict[str, Any]], **changes: Any) -> ResMoEFormat:
    names = {projection: projection for projection in PROJECTIONS}
    return parse_format(
        {
            "quant_method": "resmoe",
            "format_version": 2,
            "written_by": "tests",
            "dtype": "float16",
            "num_experts": SIZE_E,
            "hidden_size": SIZE_H,
            "intermediate_size": SIZE_I,
            "names": {"expert": "layers.{layer}.experts.{expert}", "projections": names},
            "layers": {"0": {"center": [], "residual": residual}},
        }
        | changes
    )


LARGEST = {
    "every value of three matrices": (
        {"method": "bitmap", "projections": PROJECTIONS, "values_per_expert": 3 * SIZE_I * SIZE_H},
        "values_per_expert",
    ),
    "every value of a row": (
        {"method": "bitmap_rows", "projections": PROJECTIONS, "values_per_row": SIZE_H},
        "values_per_row",
    ),
    "full rank of wide matrices": ({"method": "low_rank", "projections": PROJECTIONS, "rank": SIZE_I}, "rank"),
}


@pytest.mark.parametrize("case", LARGEST)
def test_all_is_allowed_and_one_more_is_not(case: str) -> None:
    part, count = LARGEST[case]
    assert fmt_of([part]).layers[0].residual[0].model_dump(mode="json")[count] == part[count]
    with pytest.raises(FormatError, match=f"{count} {part[count] + 1} exceeds"):
        fmt_of([{**part, count: part[count] + 1}])
    assert fmt_of([{**part, count: 1}]).layers[0].residual[0].model_dump(mode="json")[count] == 1
    with pytest.raises(FormatError, match="greater than 0"):
        fmt_of([{**part, count: 0}])


def test_rank_is_bounded_by_the_columns_too() -> None:
    """I 100 above P*H 24: the columns bind."""
    sizes = {"intermediate_size": 100, "hidden_size": 8}
    part = {"method": "low_rank", "projections": PROJECTIONS}
    assert fmt_of([{**part, "rank": 24}], **sizes).layers[0].residual[0].rank == 24
    with pytest.raises(FormatError, match=r"rank 25 exceeds min\(I, columns\) = 24"):
        fmt_of([{**part, "rank": 25}], **sizes)


@pytest.mark.parametrize("method", ["dense", "quantized"])
def test_a_part_covers_something(method: str) -> None:
    center = {"method": method, "projections": [], **({"bits": 4} if method == "quantized" else {})}
    residual = [{"method": "quantized", "projections": PROJECTIONS, "bits": 4}]
    with pytest.raises(FormatError, match="at least 1 item"):
        fmt_of([], layers={"0": {"center": [center], "residual": residual}})


@pytest.mark.parametrize(
    "part",
    [
        {"method": "bitmap", "values_per_expert": 1},
        {"method": "bitmap_rows", "values_per_row": 1},
        {"method": "low_rank", "rank": 1},
        {"method": "quantized", "bits": 4},
    ],
    ids=lambda part: part["method"],
)
def test_a_residual_part_covers_something(part: dict[str, Any]) -> None:
    whole = {"method": "quantized", "projections": PROJECTIONS, "bits": 2}
    with pytest.raises(FormatError, match="at least 1 item"):
        fmt_of([{**part, "projections": []}, whole])


def test_names_may_be_of_one_projection_and_none_is_refused() -> None:
    part = {"method": "quantized", "projections": [DOWN], "bits": 4}
    names = {"expert": "{layer}.{expert}", "projections": {DOWN: "wo"}}
    assert next(iter(layer_tensors(fmt_of([part], names=names, num_experts=1), 0))) == "0.0.wo.resmoe_codes"
    with pytest.raises(FormatError, match="at least 1 item"):
        fmt_of([part], names={**names, "projections": {}})


@pytest.mark.parametrize("expert", ["{layer}.x", "{expert}.x", "{layer}.{layer}.{expert}", "{layer}.{expert}.{expert}"])
def test_each_placeholder_stands_once(expert: str) -> None:
    part = {"method": "quantized", "projections": PROJECTIONS, "bits": 4}
    with pytest.raises(FormatError, match="once, found"):
        fmt_of([part], names={"expert": expert, "projections": {p: p for p in PROJECTIONS}})


def test_layer_zero_is_a_layer_and_minus_one_is_not() -> None:
    part = {"method": "quantized", "projections": PROJECTIONS, "bits": 4}
    layer = {"center": [], "residual": [part]}
    assert list(fmt_of([], layers={"0": layer, "7": layer}).layers) == [0, 7]
    with pytest.raises(FormatError, match="layer index -1 is negative"):
        fmt_of([], layers={"-1": layer})


@pytest.mark.parametrize(("columns", "expected"), [(1, 8), (63, 8), (64, 8), (65, 16), (128, 16), (129, 24)])
def test_mask_rows_are_whole_words(columns: int, expected: int) -> None:
    assert mask_row_bytes(columns) == expected


@pytest.mark.parametrize(("columns", "octets"), [(1, 1), (8, 1), (9, 2), (16, 2), (17, 3)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_code_rows_are_whole_octets(bits: int, columns: int, octets: int) -> None:
    assert code_row_bytes(bits, columns) == bits * octets


def test_groups_of_columns() -> None:
    assert [num_groups(columns, 32) for columns in (1, 31, 32, 33, 64, 65)] == [1, 1, 1, 2, 2, 3]
    assert num_groups(1000, None) == 1


PARTS: dict[str, dict[str, Any]] = {
    "bitmap": {"values_per_expert": 100},
    "bitmap_rows": {"values_per_row": 11},
    "low_rank": {"rank": 2},
    "quantized": {"bits": 3, "group_size": 32},
}
PARAMS = {
    "bitmap": 100,
    "bitmap_rows": 3 * SIZE_I * 11,
    "low_rank": 2 * (SIZE_I + 3 * SIZE_H),
    "quantized": 3 * SIZE_I * SIZE_H,
}


@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("method", PARTS)
def test_sizes_by_hand(method: str, biases: bool) -> None:
    residual = [{"method": method, "projections": PROJECTIONS, **PARTS[method]}]
    center = [
        {"method": "dense", "projections": [GATE, UP]},
        {"method": "quantized", "projections": [DOWN], "bits": 8},
    ]
    fmt = fmt_of([], biases=biases, layers={"0": {"center": center, "residual": residual}})
    bias = 2 * SIZE_I + SIZE_H if biases else 0
    assert layer_params(fmt, 0) == 3 * SIZE_I * SIZE_H + SIZE_E * (PARAMS[method] + bias)
    assert layer_bytes(fmt, 0) == sum(spec.nbytes for spec in layer_tensors(fmt, 0).values())
    rows = 3 * SIZE_I if method == "bitmap" else 0
    assert row_pointer_bytes(fmt, 0) == 4 * SIZE_E * rows
    dense = SIZE_E * (3 * SIZE_I * SIZE_H + bias)
    assert (dense_layer_bytes(fmt), dense_layer_bytes(fmt, 4)) == (2 * dense, 4 * dense)


@pytest.mark.parametrize(("groups", "maps"), [(1, 0), (2, 2), (3, 3)])
def test_only_several_groups_need_a_map_each(groups: int, maps: int) -> None:
    residual = [{"method": "quantized", "projections": PROJECTIONS, "bits": 4}]
    experts = [list(range(number, SIZE_E, groups)) for number in range(groups)]
    layer = {"center": [], "groups": [{"experts": own, "residual": residual} for own in experts]}
    assert group_map_bytes(fmt_of([], layers={"0": layer}), 0) == 4 * SIZE_E * maps


def test_names_end_in_a_suffix() -> None:
    assert is_resmoe_name("a.b.resmoe_u")
    assert is_resmoe_name("resmoe_mask")
    assert not is_resmoe_name("a.resmoe_u.weight")
    assert not is_resmoe_name("a.resmoe_unknown")


def test_projections_of_a_layer_in_the_design_matrixs_order() -> None:
    """Those that residuals cover, with and without groups."""
    parts = [{"method": "quantized", "projections": own, "bits": 4} for own in ([DOWN], [UP])]
    plain = {"center": [], "residual": parts}
    grouped = {"center": [], "groups": [{"experts": list(range(SIZE_E)), "residual": parts}]}
    names = {"expert": "{layer}.{expert}", "projections": {UP: "wi", DOWN: "wo"}}
    fmt = fmt_of([], layers={"0": plain, "1": grouped}, names=names)
    assert fmt.layers[0].projections == fmt.layers[1].projections == (UP, DOWN)
    assert {spec.projection for spec in layer_tensors(fmt, 1).values()} == {UP, DOWN}


def test_an_error_says_where_in_the_block() -> None:
    part = {"method": "quantized", "projections": PROJECTIONS, "bits": 4}
    with pytest.raises(FormatError, match=r"^config\.json: quantization_config: num_experts: "):
        fmt_of([part], num_experts=0)
    with pytest.raises(
        FormatError, match=r"^config\.json: quantization_config: layers\.0: .*either a residual or groups"
    ):
        fmt_of([])
    with pytest.raises(FormatError, match=r"^config\.json: quantization_config: quantization_config: .*layer 0: "):
        fmt_of([{**part, "projections": [UP]}])
    with pytest.raises(FormatError, match=r"^here: quant_method is None"):
        parse_format({}, "here")
