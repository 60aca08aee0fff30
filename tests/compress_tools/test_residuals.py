"""Residual coders by law: exact counts, exact optimum, more budget less error, everything kept restores."""

import pytest
import torch

from compress_tools.errors import ConfigError
from compress_tools.format.codec import decode_residual
from compress_tools.format.schema import LayerSpec
from compress_tools.format.tensors import VALUES
from compress_tools.residuals.budget import affordable_rank
from compress_tools.residuals.prune import largest_magnitudes
from compress_tools.residuals.registry import METHODS
from compress_tools.svd import left_singular_vectors

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def random_residual(rows: int, hidden: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 3 * hidden, generator=torch.Generator().manual_seed(seed))


def coded(method: str, residual: torch.Tensor, ratio: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rows, columns = residual.shape
    part = METHODS[method].spec(PROJECTIONS, rows, columns, ratio)
    stored = METHODS[method].encode(residual, part, dtype, seed=0)
    decoded = decode_residual(LayerSpec(center=(), residual=(part,)), stored, columns // 3)
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
    for method in METHODS:
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
    part = METHODS["low-rank"].spec(PROJECTIONS, 512, 768, 0.25)
    params = part.rank * (512 + 768)
    assert 0.25 * 512 * 768 - (512 + 768) < params <= 0.25 * 512 * 768


@pytest.mark.parametrize("method", ["prune", "low-rank"])
def test_a_budget_that_buys_nothing_is_refused(method: str) -> None:
    with pytest.raises(ConfigError, match="retain-ratio"):
        METHODS[method].spec(PROJECTIONS, 4, 6, 1e-6)


def test_values_are_stored_in_the_asked_dtype() -> None:
    residual = random_residual(8, 8)
    part = METHODS["prune"].spec(PROJECTIONS, 8, 24, 0.5)
    stored = METHODS["prune"].encode(residual, part, torch.bfloat16, seed=0)
    assert stored["gate_proj", VALUES].dtype == torch.bfloat16
