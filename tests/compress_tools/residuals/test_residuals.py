"""Residual coders by law: exact counts, exact optimum, more budget less error, everything kept restores."""

import pytest
import torch

from compress_tools.config import make_config
from compress_tools.errors import ConfigError
from compress_tools.format.codec import decode_residual, restore_center
from compress_tools.format.dtypes import DTYPES
from compress_tools.format.parts.bitmap import VALUES
from compress_tools.format.quantization import half_range
from compress_tools.format.schema import (
    BitmapResidual,
    DenseCenter,
    ExpertNames,
    LayerSpec,
    LowRankResidual,
    QuantizedCenter,
    QuantizedResidual,
    ResMoEFormat,
    RowBitmapResidual,
)
from compress_tools.format.tensors import expert_tensors
from compress_tools.residuals.budget import affordable_rank
from compress_tools.residuals.prune import largest_magnitudes, largest_of_each_row
from compress_tools.residuals.quantizer import fit_scales, quantize_rows
from compress_tools.residuals.recipes import uniform_spec
from compress_tools.residuals.registry import encode_center, encode_residual
from compress_tools.residuals.svd import left_singular_vectors

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def random_residual(rows: int, hidden: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 3 * hidden, generator=torch.Generator().manual_seed(seed))


def coded(method: str, residual: torch.Tensor, ratio: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return restored(spec_of(residual, method=method, retain_ratio=ratio), residual, dtype)


def spec_of(residual: torch.Tensor, **options: object) -> LayerSpec:
    """What ``resmoe compress --center none`` with these options makes of a residual's shape."""
    return uniform_spec(make_config(center="none", **options), PROJECTIONS, len(residual), residual.shape[1] // 3)


def restored(spec: LayerSpec, residual: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    decoded = decode_residual(spec, encode_residual(spec, residual, dtype, seed=0), residual.shape[1] // 3)
    return torch.cat([decoded[projection] for projection in PROJECTIONS], dim=1)


@pytest.mark.parametrize("method", ["prune", "low-rank"])
@pytest.mark.parametrize(("rows", "hidden"), [(16, 8), (9, 13), (40, 5)], ids=lambda n: str(n))
def test_everything_kept_restores_to_rounding(method: str, rows: int, hidden: int) -> None:
    residual = random_residual(rows, hidden)
    torch.testing.assert_close(coded(method, residual, 1.0), residual, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["prune", "low-rank"])
def test_error_falls_as_the_budget_grows(method: str) -> None:
    residual = random_residual(48, 32)
    errors = [(coded(method, residual, ratio) - residual).square().sum().item() for ratio in (0.1, 0.25, 0.5, 0.9)]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == 4


def test_pruning_keeps_exactly_the_largest() -> None:
    residual = random_residual(10, 7)
    kept = coded("prune", residual, 0.25)
    count = int(0.25 * residual.numel())
    assert int((kept != 0).sum()) == count
    assert kept[kept != 0].abs().min() >= residual[kept == 0].abs().max()
    assert torch.equal(kept[kept != 0], residual[kept != 0])


@pytest.mark.parametrize("count", [1, 5, 11, 12])
def test_ties_are_cut_to_the_exact_count(count: int) -> None:
    matrix = torch.tensor([[1.0, -1, 1, 0], [1, 1, 0, 0], [1, -1, 1, 1]])
    keep = largest_magnitudes(matrix, count)
    assert int(keep.sum()) == count


def test_all_zero_residual_is_coded() -> None:
    zeros = torch.zeros(12, 24)
    for method in ("prune", "low-rank"):
        assert torch.equal(coded(method, zeros, 0.25), zeros)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(12, 30, 4), (30, 12, 4), (16, 16, 16), (20, 60, 1)])
def test_svd_error_equals_the_dropped_singular_values(rows: int, columns: int, rank: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rank))
    left = left_singular_vectors(matrix, rank)
    error = (matrix - left @ (left.T @ matrix)).double().square().sum()
    dropped = torch.linalg.svdvals(matrix.double())[rank:].square().sum()
    torch.testing.assert_close(error, dropped, rtol=1e-4, atol=1e-6)


def test_rank_of_the_design_document() -> None:
    assert affordable_rank(14336, 3 * 4096, 0.25) == 1654


def test_low_rank_factors_hold_the_asked_share_of_params() -> None:
    (part,) = spec_of(torch.empty(512, 768), method="low-rank").residual
    params = part.rank * (512 + 768)
    assert 0.25 * 512 * 768 - (512 + 768) < params <= 0.25 * 512 * 768


@pytest.mark.parametrize("method", ["prune", "low-rank"])
def test_a_budget_that_buys_nothing_is_refused(method: str) -> None:
    with pytest.raises(ConfigError, match="retain-ratio"):
        spec_of(torch.empty(4, 6), method=method, retain_ratio=1e-6)


def test_values_are_stored_in_the_asked_dtype() -> None:
    residual = random_residual(8, 8)
    stored = encode_residual(spec_of(residual, retain_ratio=0.5), residual, torch.bfloat16, seed=0)
    assert stored["gate_proj", VALUES].dtype == torch.bfloat16


CODINGS = {
    "quantize": {"method": "quantize", "bits": 4, "group_size": 32},
    "quantize-3bit-rows": {"method": "quantize", "bits": 3, "group_size": 0},
    "low-rank-each": {"method": "low-rank", "low_rank_form": "per-projection", "retain_ratio": 0.5},
    "low-rank-8bit": {"method": "low-rank", "factor_bits": 8, "retain_ratio": 0.5},
    "low-rank+quantize": {"method": "low-rank+quantize", "bits": 2, "retain_ratio": 0.3},
    "prune-8bit": {"value_bits": 8, "retain_ratio": 0.4},
    "prune-4bit": {"value_bits": 4, "group_size": 32, "retain_ratio": 0.4},
    "prune-equal": {"prune_rows": "equal", "retain_ratio": 0.4},
    "prune-equal-4bit": {"prune_rows": "equal", "value_bits": 4, "retain_ratio": 0.4},
}


def relative_error(spec: LayerSpec, residual: torch.Tensor, dtype: torch.dtype = torch.float32) -> float:
    missed = restored(spec, residual, dtype).double() - residual
    return (missed.square().sum() / residual.double().square().sum()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("coding", CODINGS)
def test_what_is_stored_has_the_formats_shapes_and_dtypes(coding: str, dtype: torch.dtype) -> None:
    residual = random_residual(9, 37)
    spec = spec_of(residual, **CODINGS[coding])
    names = ExpertNames(expert="{layer}.{expert}", projections={name: name for name in PROJECTIONS})
    fmt = ResMoEFormat(
        written_by="tests", dtype=str(dtype).removeprefix("torch."), num_experts=1, hidden_size=37,
        intermediate_size=9, names=names, layers={0: spec},
    )  # fmt: skip
    found = {key: (t.shape, t.dtype) for key, t in encode_residual(spec, residual, dtype, seed=0).items()}
    expected = {(t.projection, t.suffix): (t.shape, DTYPES[t.dtype]) for t in expert_tensors(fmt, spec, 0)}
    assert found == expected


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e15], ids=str)
@pytest.mark.parametrize("coding", CODINGS)
def test_error_does_not_depend_on_the_residuals_size(coding: str, scale: float) -> None:
    """Nearly equal experts leave tiny residuals: scales neither underflow nor overflow."""
    residual = random_residual(24, 40)
    spec = spec_of(residual, **CODINGS[coding])
    assert relative_error(spec, residual * scale) == pytest.approx(relative_error(spec, residual), rel=0.05)


@pytest.mark.parametrize("coding", CODINGS)
def test_zeros_are_restored_as_zeros(coding: str) -> None:
    zeros = torch.zeros(12, 120)
    assert torch.equal(restored(spec_of(zeros, **CODINGS[coding]), zeros), zeros)


@pytest.mark.parametrize("group_size", [None, 32, 128], ids=lambda g: f"g{g}")
def test_quantisation_error_falls_with_bits_to_nearly_nothing(group_size: int | None) -> None:
    residual = random_residual(32, 200)
    errors = [
        relative_error(spec_of(residual, method="quantize", bits=bits, group_size=group_size or 0), residual)
        for bits in (2, 3, 4, 8)
    ]
    # Lloyd-Max, whose levels are not even, loses 0.118, 0.0345 and 0.0095 of a gaussian's energy; a whole row of
    # 200 values has lighter tails. Even levels may lose a fifth more.
    assert errors[0] < 0.13
    assert errors[1] < 0.042
    assert errors[2] < 0.0125
    assert errors[3] < 1e-4


def test_smaller_groups_lose_less() -> None:
    residual = random_residual(16, 256)
    errors = [
        relative_error(spec_of(residual, method="quantize", bits=3, group_size=size), residual)
        for size in (0, 128, 64, 32)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["gaussian", "heavy", "uniform", "one outlier"])
def test_scale_search_is_never_worse_than_the_largest_magnitudes(bits: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    groups = torch.randn(64, 32, generator=generator)
    if kind == "heavy":
        groups = groups**3
    elif kind == "uniform":
        groups = torch.rand(64, 32, generator=generator) - 0.5
    elif kind == "one outlier":
        groups[:, 5] = 40

    def error(scales: torch.Tensor) -> torch.Tensor:
        wide = scales.float()[:, None]
        levels = ((groups / wide).floor() + 0.5).clamp(-half_range(bits), half_range(bits))
        return (groups - levels * wide).square().sum(1)

    largest = (groups.abs().amax(1) / half_range(bits)).to(torch.bfloat16)
    found = error(fit_scales(groups, None, bits))
    assert (found <= error(largest) * (1 + 1e-5)).all()
    assert found.sum() < error(largest).sum() or bits == 8


def test_scales_are_refitted_to_where_no_other_scale_is_better() -> None:
    """Two-level rows are met exactly: every magnitude is a level."""
    signs = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).sign()
    residual = torch.cat([signs * magnitude for magnitude in (0.5, 0.25, 3.0)], 1)
    for bits in (2, 3, 4):
        assert relative_error(spec_of(residual, method="quantize", bits=bits, group_size=64), residual) < 1e-5


def test_dropped_values_do_not_spoil_the_scales_of_kept_ones() -> None:
    kept = torch.full((4, 64), 0.01)
    kept[:, ::4] = torch.tensor([3.0, -3.0, 3.0, 3.0])[:, None]
    codes, scales = quantize_rows(kept, 4, None, kept.abs() > 1)
    values = (codes.float() - half_range(4)) * scales.float()
    torch.testing.assert_close(values[:, ::4], kept[:, ::4], rtol=5e-3, atol=0)


def test_each_part_codes_what_the_earlier_ones_left_as_stored() -> None:
    residual = random_residual(40, 64)
    both = spec_of(residual, method="low-rank+quantize", bits=3, retain_ratio=0.2, factor_bits=8)
    low_rank, quantized = both.residual
    one = LayerSpec(center=(), residual=(low_rank,))
    remainder = residual - restored(one, residual, torch.bfloat16)
    two = LayerSpec(center=(), residual=(quantized,))
    expected = restored(one, residual, torch.bfloat16) + restored(two, remainder)
    torch.testing.assert_close(restored(both, residual, torch.bfloat16), expected, rtol=0, atol=1e-6)
    plain = spec_of(residual, method="quantize", bits=3)
    assert relative_error(both, residual) < relative_error(plain, residual)


@pytest.mark.parametrize("hidden", [64, 37], ids=lambda n: f"H{n}")
def test_any_parts_add_up(hidden: int) -> None:
    """Three methods on one projection, two on another."""
    residual = random_residual(24, hidden)
    spec = LayerSpec(
        center=(),
        residual=(
            LowRankResidual(projections=("down_proj", "gate_proj"), rank=6),
            BitmapResidual(projections=("gate_proj",), values_per_expert=300 * hidden // 64),
            QuantizedResidual(projections=("gate_proj", "up_proj"), bits=2, group_size=32),
            RowBitmapResidual(projections=("up_proj",), values_per_row=20 * hidden // 64, value_bits=8),
        ),
    )
    gate, up, down = ((restored(spec, residual) - residual).square().view(24, 3, hidden).mean((0, 2))).tolist()
    assert gate < up < down
    stored = encode_residual(spec, residual, torch.float32, 0)
    parts = [part.decode(stored, hidden) for part in spec.residual]
    total = sum(part["gate_proj"] for part in parts[:3])
    torch.testing.assert_close(restored(spec, residual)[:, :hidden], total, rtol=0, atol=0)


def test_equal_rows_keep_equally_many_and_lose_more_than_global() -> None:
    residual = random_residual(64, 96) * torch.linspace(0.5, 1.5, 64)[:, None]
    equal = restored(spec_of(residual, prune_rows="equal"), residual)
    for projection in equal.split(96, 1):
        assert ((projection != 0).sum(1) == 24).all()
    kept = equal != 0
    assert torch.equal(equal[kept], residual[kept])
    anywhere = relative_error(spec_of(residual), residual)
    assert anywhere < relative_error(spec_of(residual, prune_rows="equal"), residual) < 1.3 * anywhere


def test_equal_rows_keep_everything() -> None:
    assert largest_of_each_row(torch.zeros(3, 5), 5).all()
    residual = random_residual(6, 9)
    assert torch.equal(restored(spec_of(residual, prune_rows="equal", retain_ratio=1.0), residual), residual)


def test_equal_rows_are_cut_to_the_exact_count_at_ties() -> None:
    ties = torch.tensor([[1.0, -1, 1, 0], [2, 2, 2, 2], [0, 0, 0, 0]])
    keep = largest_of_each_row(ties, 2)
    assert keep.tolist() == [[True, True, False, False]] * 3


def test_value_bits_cost_little_beside_what_pruning_drops() -> None:
    residual = random_residual(48, 128)
    plain, eight, four = (relative_error(spec_of(residual, value_bits=bits), residual) for bits in (16, 8, 4))
    assert plain < eight < plain * 1.001
    assert eight < four < plain * 1.06


def test_eight_bit_factors_are_nearly_lossless() -> None:
    residual = random_residual(48, 32)
    plain, eight = (
        relative_error(spec_of(residual, method="low-rank", retain_ratio=0.5, factor_bits=bits), residual)
        for bits in (16, 8)
    )
    assert plain < eight < plain + 2e-4


def test_one_svd_for_each_projection_holds_the_asked_share_too() -> None:
    parts = spec_of(torch.empty(512, 3 * 256), method="low-rank", low_rank_form="per-projection").residual
    assert [part.projections for part in parts] == [(name,) for name in PROJECTIONS]
    params = sum(part.rank * (512 + 256) for part in parts)
    assert 0.25 * 512 * 768 - 3 * (512 + 256) < params <= 0.25 * 512 * 768


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_center_is_stored_in_the_asked_bits(bits: int) -> None:
    center = random_residual(16, 40)
    spec = uniform_spec(make_config(center_bits=bits), PROJECTIONS, 16, 40)
    rows = restore_center(spec, encode_center(spec, center, torch.bfloat16), 40)
    found = torch.cat([rows[projection] for projection in PROJECTIONS], 1)
    error = (found - center).square().sum() / center.square().sum()
    low, high = {16: (1e-7, 1e-5), 8: (1e-5, 1e-4), 4: (1e-3, 1e-2)}[bits]
    assert low < error < high


def test_a_center_of_some_projections_in_any_order() -> None:
    center = random_residual(8, 16)
    parts = (DenseCenter(projections=("down_proj",)), QuantizedCenter(projections=("gate_proj",), bits=8))
    spec = LayerSpec(center=parts, residual=(QuantizedResidual(projections=PROJECTIONS, bits=2),))
    rows = restore_center(spec, encode_center(spec, center, torch.float32), 16)
    assert set(rows) == {"down_proj", "gate_proj"}
    torch.testing.assert_close(rows["down_proj"], center[:, 32:], rtol=0, atol=0)
    torch.testing.assert_close(rows["gate_proj"], center[:, :16], rtol=0, atol=0.02)
