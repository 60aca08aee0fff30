"""Both SVD routes against the exact spectrum: at most 0.1 % more error than the best truncation, on every spectrum."""

import pytest
import torch

from compress_tools.residuals import svd
from compress_tools.residuals.svd import cheaper_route, left_singular_vectors, tail_energy


def spectra(name: str) -> tuple[torch.Tensor, int]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if name == "flat, wide":  # residuals of unrelated experts
        return normal(400, 1200), 70
    if name == "flat, tall":
        return normal(700, 500), 60
    if name == "uneven rows and columns":
        return normal(400, 600) * torch.exp(0.7 * normal(400, 1)) * torch.exp(0.7 * normal(1, 600)), 60
    if name == "low rank and noise":
        return normal(400, 40) @ normal(40, 900) + 0.3 * normal(400, 900), 70
    if name == "exact low rank":
        return normal(300, 20) @ normal(20, 500), 40
    if name == "decaying":
        return normal(500, 500) * torch.logspace(0, -4, 500)[:, None], 30
    if name == "one column of outliers":
        matrix = normal(400, 600)
        matrix[:, 3] *= 300
        return matrix, 60
    return torch.zeros(300, 400), 40


NAMES = (
    "flat, wide",
    "flat, tall",
    "uneven rows and columns",
    "low rank and noise",
    "exact low rank",
    "decaying",
    "one column of outliers",
    "zero",
)


@pytest.mark.parametrize("route", ["eigh", "filter", None])
@pytest.mark.parametrize("name", NAMES)
def test_error_is_within_a_thousandth_of_the_optimum(name: str, route: str | None) -> None:
    matrix, rank = spectra(name)
    left = left_singular_vectors(matrix, rank, 0, route)
    energy = matrix.double().square().sum().item()
    error = (matrix.double() - left.double() @ (left.double().T @ matrix.double())).square().sum().item()
    assert error <= 1.001 * torch.linalg.svdvals(matrix.double())[rank:].square().sum().item() + 1e-12 * energy
    torch.testing.assert_close(left.T @ left, torch.eye(rank), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_exact_tail_is_the_spectrum_s(name: str) -> None:
    matrix, rank = spectra(name)
    exact = torch.linalg.svdvals(matrix.double())[rank:].square().sum().item()
    assert tail_energy(matrix, rank) == pytest.approx(exact, rel=1e-6, abs=1e-9 * matrix.square().sum().item() + 1e-30)


def test_same_seed_same_bytes_and_another_seed_the_same_quality() -> None:
    matrix, rank = spectra("flat, wide")
    first = left_singular_vectors(matrix, rank, 0, "filter")
    assert torch.equal(first, left_singular_vectors(matrix, rank, 0, "filter"))
    other = left_singular_vectors(matrix, rank, 1, "filter")
    kept = [(left.T @ matrix).square().sum().item() for left in (first, other)]
    assert kept[0] == pytest.approx(kept[1], rel=1e-3)


@pytest.mark.parametrize(
    ("size", "rank", "route"), [(64, 16, "eigh"), (1408, 1400, "eigh"), (1408, 286, "filter"), (12288, 1654, "filter")]
)
def test_the_cheaper_route_is_taken(size: int, rank: int, route: str) -> None:
    assert cheaper_route(size, rank) == route


def test_a_tail_below_fp32_is_found_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, rank = spectra("exact low rank")
    asked = []
    exact = svd._by_eigh
    monkeypatch.setattr(svd, "_by_eigh", lambda *arguments: asked.append(1) or exact(*arguments))
    left_singular_vectors(matrix, rank, 0, "filter")
    assert asked
