"""Counts and ranks at the very ends of what a ratio pays for."""

import pytest

from compress_tools.config import make_config
from compress_tools.errors import ConfigError
from compress_tools.format.schema import (
    BitmapResidual,
    DenseCenter,
    LowRankResidual,
    QuantizedCenter,
    QuantizedResidual,
    RowBitmapResidual,
)
from compress_tools.residuals.budget import affordable_rank, kept_per_row, kept_values
from compress_tools.residuals.recipes import RECIPES, uniform_spec

JOINT = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("rows", "columns", "ratio", "count"),
    [
        (4, 16, 1 / 64, 1),  # exactly one
        (4, 16, 2 / 64 - 1e-9, 1),  # nearly two
        (4, 16, 2 / 64, 2),
        (4, 16, 0.25, 16),
        (4, 16, 1.0, 64),  # everything
        (4, 16, 1 - 1e-9, 63),
        (16, 4, 0.5, 32),
        (1, 2, 0.5, 1),
    ],
)
def test_kept_values_are_rounded_down(rows: int, columns: int, ratio: float, count: int) -> None:
    assert kept_values(rows, columns, ratio) == count


@pytest.mark.parametrize(
    ("columns", "ratio", "count"),
    [(16, 1 / 16, 1), (16, 2 / 16 - 1e-9, 1), (16, 2 / 16, 2), (16, 1.0, 16), (16, 1 - 1e-9, 15), (2, 0.5, 1)],
)
def test_kept_values_of_a_row_are_rounded_down(columns: int, ratio: float, count: int) -> None:
    assert kept_per_row(columns, ratio) == count


# I*D / (I + D) is 3 for 4 x 12 and 12 x 4, and 8 for 16 x 16.
@pytest.mark.parametrize(
    ("rows", "columns", "ratio", "rank"),
    [
        (16, 16, 1 / 8, 1),  # exactly rank 1
        (16, 16, 2 / 8 - 1e-9, 1),
        (16, 16, 2 / 8, 2),
        (16, 16, 1 - 1e-9, 7),  # factors of full rank would be larger than the matrix
        (16, 16, 1.0, 16),  # all of it, whatever it takes
        (4, 12, 0.7, 2),
        (12, 4, 0.7, 2),
        (4, 12, 1.0, 4),
        (12, 4, 1.0, 4),
    ],
)
def test_ranks_are_rounded_down(rows: int, columns: int, ratio: float, rank: int) -> None:
    assert affordable_rank(rows, columns, ratio) == rank


def test_what_pays_for_nothing_is_refused_by_what_it_is() -> None:
    with pytest.raises(ConfigError, match=r"--retain-ratio 0\.0156 keeps no value of a 4 x 16 residual"):
        kept_values(4, 16, 0.0156)
    with pytest.raises(ConfigError, match=r"--retain-ratio 0\.0624 keeps no value of a row of 16 columns"):
        kept_per_row(16, 0.0624)
    with pytest.raises(ConfigError, match=r"--retain-ratio 0\.1249 does not pay for rank 1 of a 16 x 16 residual"):
        affordable_rank(16, 16, 0.1249)


# I 8, H 20: what each option comes to, in numbers.
RECIPE_ROWS = [
    ("prune", {"retain_ratio": 0.3}, (BitmapResidual(projections=JOINT, values_per_expert=144),)),
    (
        "prune",
        {"retain_ratio": 0.1, "value_bits": 8, "group_size": 32},
        (BitmapResidual(projections=JOINT, values_per_expert=48, value_bits=8, group_size=32),),
    ),
    (
        "prune",
        {"retain_ratio": 0.12, "prune_rows": "equal", "value_bits": 4, "group_size": 0},
        (RowBitmapResidual(projections=JOINT, values_per_row=2, value_bits=4),),
    ),
    ("prune", {"retain_ratio": 0.3, "prune_rows": "equal"}, (RowBitmapResidual(projections=JOINT, values_per_row=6),)),
    ("low-rank", {"retain_ratio": 0.5}, (LowRankResidual(projections=JOINT, rank=3),)),
    (
        "low-rank",
        {"retain_ratio": 0.5, "low_rank_form": "per-projection", "factor_bits": 8},
        tuple(LowRankResidual(projections=(name,), rank=2, factor_bits=8) for name in JOINT),
    ),
    ("quantize", {"bits": 3, "group_size": 0}, (QuantizedResidual(projections=JOINT, bits=3),)),
    ("quantize", {"bits": 2}, (QuantizedResidual(projections=JOINT, bits=2, group_size=128),)),
    (
        "low-rank+quantize",
        {"retain_ratio": 0.2, "bits": 8, "group_size": 64},
        (
            LowRankResidual(projections=JOINT, rank=1),
            QuantizedResidual(projections=JOINT, bits=8, group_size=64),
        ),
    ),
]


@pytest.mark.parametrize(("method", "options", "parts"), RECIPE_ROWS, ids=lambda value: None)
def test_recipes(method: str, options: dict, parts: tuple) -> None:
    config = make_config(method=method, **options)
    assert RECIPES[config.method](config, JOINT, 8, 20) == parts
    assert uniform_spec(config, JOINT, 8, 20).residual == parts


@pytest.mark.parametrize(
    ("options", "center"),
    [
        ({}, (DenseCenter(projections=JOINT),)),
        ({"center_bits": 8}, (QuantizedCenter(projections=JOINT, bits=8, group_size=128),)),
        ({"center_bits": 4, "group_size": 0}, (QuantizedCenter(projections=JOINT, bits=4),)),
        ({"center": "none"}, ()),
        ({"center": "mean"}, (DenseCenter(projections=JOINT),)),
    ],
    ids=lambda value: None,
)
def test_centers(options: dict, center: tuple) -> None:
    assert uniform_spec(make_config(method="quantize", **options), JOINT, 8, 20).center == center
