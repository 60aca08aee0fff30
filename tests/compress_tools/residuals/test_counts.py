"""Counts and ranks at their limits, recipes option by option, selection in long matrices, scales against a search."""

import pytest
import torch

from compress_tools.config import make_config
from compress_tools.errors import ConfigError
from compress_tools.format.quantization import half_range
from compress_tools.format.schema import DenseCenter, QuantizedCenter
from compress_tools.residuals import prune, quantizer
from compress_tools.residuals.budget import affordable_rank, kept_per_row, kept_values
from compress_tools.residuals.prune import largest_magnitudes, largest_of_each_row
from compress_tools.residuals.quantizer import fit_scales, quantize_rows
from compress_tools.residuals.recipes import uniform_spec

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def test_counts_are_rounded_down() -> None:
    assert [kept_values(3, 7, ratio) for ratio in (0.048, 0.5, 0.999, 1.0)] == [1, 10, 20, 21]
    assert [kept_per_row(7, ratio) for ratio in (0.143, 0.5, 0.99, 1.0)] == [1, 3, 6, 7]
    # 3 * 60 / 63 = 2.86 for the whole matrix
    assert [affordable_rank(3, 60, ratio) for ratio in (0.36, 0.71, 0.999)] == [1, 2, 2]


def test_the_least_that_is_kept_is_one_of_each() -> None:
    assert (kept_values(4, 25, 0.01), kept_per_row(50, 0.02), affordable_rank(10, 10, 0.2)) == (1, 1, 1)
    for too_little in (
        lambda: kept_values(4, 25, 0.0099),
        lambda: kept_per_row(50, 0.0199),
        lambda: affordable_rank(10, 10, 0.199),
    ):
        with pytest.raises(ConfigError, match=r"--retain-ratio 0\.\d+ (keeps no value|does not pay for rank 1)"):
            too_little()


@pytest.mark.parametrize(("rows", "columns"), [(5, 40), (40, 5), (6, 6)])
def test_all_is_full_rank_whatever_the_shape(rows: int, columns: int) -> None:
    assert affordable_rank(rows, columns, 1.0) == min(rows, columns)
    assert affordable_rank(rows, columns, 0.9999) < min(rows, columns)


def parts_of(**options: object) -> tuple:
    spec = uniform_spec(make_config(**options), PROJECTIONS, 24, 200)
    assert all(part.projections == PROJECTIONS for part in spec.center)
    return spec.center, spec.residual


@pytest.mark.parametrize("group_size", [0, 32, 64, 128])
def test_a_group_size_reaches_every_part_with_codes(group_size: int) -> None:
    """Group size 0 is a scale for each row."""
    stored, asked = group_size or None, {"group_size": group_size}
    (center,), (part,) = parts_of(method="quantize", bits=3, center_bits=8, **asked)
    assert isinstance(center, QuantizedCenter)
    assert (center.bits, center.group_size, part.bits, part.group_size) == (8, stored, 3, stored)
    (center,), (part,) = parts_of(value_bits=8, retain_ratio=0.1, **asked)
    assert isinstance(center, DenseCenter)
    assert (part.values_per_expert, part.value_bits, part.group_size) == (3 * 24 * 20, 8, stored)
    _, (part,) = parts_of(value_bits=4, prune_rows="equal", retain_ratio=0.1, **asked)
    assert (part.values_per_row, part.value_bits, part.group_size) == (20, 4, stored)
    _, (first, second) = parts_of(method="low-rank+quantize", bits=2, factor_bits=8, retain_ratio=0.5, **asked)
    assert (first.rank, first.factor_bits, second.bits, second.group_size) == (11, 8, 2, stored)


def test_without_codes_there_are_no_groups() -> None:
    center, (part,) = parts_of(center="none", value_bits=16, retain_ratio=0.1)
    assert (center, part.value_bits, part.group_size) == ((), None, None)
    _, each = parts_of(method="low-rank", low_rank_form="per-projection", factor_bits=16, retain_ratio=0.5)
    assert [(part.projections, part.rank, part.factor_bits) for part in each] == [((p,), 10, None) for p in PROJECTIONS]


LONG = (1 << 20) + 17


def long_values(ties: bool) -> torch.Tensor:
    values = torch.randn(LONG, generator=torch.Generator().manual_seed(LONG))
    return (values * 50).round() if ties else values


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("count", [1, 1000, LONG // 4, LONG // 2, LONG - 2, LONG - 1])
def test_long_matrices_keep_exactly_the_largest(count: int, ties: bool) -> None:
    """More than 2**20 values: the quantile is estimated from a sample, and must be exact all the same."""
    values = long_values(ties)
    keep = largest_magnitudes(values, count)
    assert int(keep.sum()) == count
    assert values[keep].abs().min() >= values[~keep].abs().max()


@pytest.mark.parametrize("order", ["sorted", "reversed", "periodic"])
def test_a_sample_that_misleads_costs_time_only(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "_SAMPLE", 64)
    monkeypatch.setattr(prune, "_MARGIN", 2)
    values = torch.randn(64 * 33, generator=torch.Generator().manual_seed(0))
    if order == "periodic":
        values[::33] *= 100
    else:
        values = values.abs().sort(descending=order == "reversed").values
    for count in (1, 2, 60, 64, 65, 500, 1056, len(values) - 65, len(values) - 1):
        keep = largest_magnitudes(values, count)
        assert int(keep.sum()) == count
        assert values[keep].abs().min() >= values[~keep].abs().max()


def test_ties_go_to_the_first_places_in_any_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.ones(5, 4)
    matrix[1, 2], matrix[3] = 2, 0
    for portion in (1, 3, 8, 1 << 24):
        monkeypatch.setattr(prune, "_TIES_AT_ONCE", portion)
        for count in range(1, 17):
            expected = [6, *(place for place in range(20) if place != 6 and place // 4 != 3)][:count]
            assert largest_magnitudes(matrix, count).flatten().nonzero().flatten().tolist() == sorted(expected)


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_rows_keep_their_own_largest(count: int) -> None:
    matrix = torch.randn(6, 8, generator=torch.Generator().manual_seed(count)) * torch.logspace(0, 5, 6)[:, None]
    keep = largest_of_each_row(matrix, count)
    assert keep.shape == matrix.shape
    assert keep.sum(1).tolist() == [count] * 6
    for row, mask in zip(matrix.abs(), keep, strict=True):
        assert sorted(row[mask].tolist()) == row.sort().values[-count:].tolist()


def squared_error(groups: torch.Tensor, keep: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    wide = scales.float()[:, None]
    levels = ((groups / wide).floor() + 0.5).clamp(-half_range(bits), half_range(bits))
    return ((groups - levels * wide).square() * keep).sum(1)


@pytest.mark.parametrize("kept", [1.0, 0.6], ids=["", "kept 60 %"])
@pytest.mark.parametrize(("bits", "factor"), [(2, 1.005), (3, 1.012), (4, 1.02), (8, 1.4)])
def test_scales_are_within_a_factor_of_a_search(bits: int, factor: float, kept: float) -> None:
    """1500 scales for each group: the fit's few are as good to 0.1, 0.5 and 1 % of the error, a third at 8 bits."""
    generator = torch.Generator().manual_seed(bits)
    groups = torch.randn(64, 32, generator=generator)
    keep = torch.rand(64, 32, generator=generator) < kept
    groups *= keep
    peak = groups.abs().amax(1)
    shares = torch.linspace(0.02, 1.05, 1500)
    searched = [squared_error(groups, keep, (peak * s / half_range(bits)).bfloat16(), bits) for s in shares]
    found = squared_error(groups, keep, fit_scales(groups, None if kept == 1 else keep, bits), bits)
    assert found.sum() < factor * torch.stack(searched).amin(0).sum()


@pytest.mark.parametrize("masked", [False, True], ids=["", "kept"])
@pytest.mark.parametrize("group_size", [None, 32])
def test_rows_are_coded_alike_in_any_portions(group_size: int | None, masked: bool, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(11, 70, generator=generator)
    keep = torch.rand(11, 70, generator=generator) < 0.5 if masked else None
    codes, scales = quantize_rows(matrix, 4, group_size, keep)
    for portion in (1, 96 * 3, 96 * 11):
        monkeypatch.setattr(quantizer, "CHUNK_VALUES", {"cpu": portion})
        other_codes, other_scales = quantize_rows(matrix, 4, group_size, keep)
        assert torch.equal(other_codes, codes)
        assert torch.equal(other_scales, scales)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_short_last_group_is_fitted_to_its_own_columns(bits: int) -> None:
    """Columns that only fill up the group don't count: the last group is coded as if it stood alone."""
    matrix = torch.randn(16, 70, generator=torch.Generator().manual_seed(bits))
    codes, scales = quantize_rows(matrix, bits, 64)
    alone_codes, alone_scales = quantize_rows(matrix[:, 64:].contiguous(), bits, None)
    assert torch.equal(scales[:, 1:], alone_scales)
    assert torch.equal(codes[:, 64:], alone_codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_the_nearest_levels(bits: int) -> None:
    matrix = torch.randn(8, 40, generator=torch.Generator().manual_seed(bits))
    codes, scales = quantize_rows(matrix, bits)
    levels = torch.arange(2**bits) - half_range(bits)
    distance = (matrix[..., None] - levels * scales.float()[..., None]).abs()
    chosen = distance.gather(2, codes.long()[..., None])[..., 0]
    torch.testing.assert_close(chosen, distance.amin(2), rtol=0, atol=1e-6)


def test_a_zero_group_beside_others_has_scale_zero() -> None:
    matrix = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    matrix[1, 32:64] = 0
    codes, scales = quantize_rows(matrix, 3, 32)
    assert (scales == 0).nonzero().tolist() == [[1, 1]]
    assert int(codes.max()) <= 7
