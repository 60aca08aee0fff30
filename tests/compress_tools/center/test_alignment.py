"""Alignment by law: permutations, optimal cost, the same from every solver."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from compress_tools.center import alignment
from compress_tools.center.alignment import Start, align_experts
from compress_tools.center.assignment import MAX_GAP, Certificate, certify, solve_with_lapx, solve_with_pot
from compress_tools.errors import NumericalError
from compress_tools.numerics.work import Work


def random_design(num_experts: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(0.3 * torch.randn(num_experts, rows, 1, generator=generator))
    return torch.randn(num_experts, rows, columns, generator=generator) * scale


@pytest.mark.parametrize("rows", [1, 2, 17, 64, 300, 1024], ids=lambda n: f"I{n}")
def test_solvers_reach_the_same_cost(rows: int) -> None:
    design = random_design(2, rows, 24)
    cost = torch.cdist(design[0].double(), design[1].double()).square().numpy()
    totals = {
        "pot": cost[np.arange(rows), solve_with_pot(cost)].sum(),
        "lapx": cost[np.arange(rows), solve_with_lapx(cost)].sum(),
        "scipy": cost[linear_sum_assignment(cost)].sum(),
    }
    assert max(totals.values()) <= min(totals.values()) * (1 + 1e-9), totals


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_perm_is_a_permutation_and_workers_do_not_matter(workers: int) -> None:
    design = random_design(4, 40, 12)
    found = align_experts(design, design[0], work=Work(workers))
    perm, distances = found.perm, found.distance
    assert torch.equal(perm.sort(dim=1).values, torch.arange(40).expand(4, 40))
    assert torch.equal(perm, align_experts(design, design[0]).perm)
    expected = torch.stack([(design[e][perm[e]] - design[0]).double().square().sum() for e in range(4)])
    torch.testing.assert_close(distances, expected, rtol=1e-5, atol=1e-4)


def test_shuffled_copies_are_found_exactly() -> None:
    base = random_design(1, 300, 16)[0]
    shuffles = torch.stack([torch.randperm(300, generator=torch.Generator().manual_seed(s)) for s in range(3)])
    design = base[shuffles]
    found = align_experts(design, base)
    for expert in range(3):
        assert torch.equal(design[expert][found.perm[expert]], base)
    assert found.distance.abs().max() < 1e-2


def test_overflow_names_the_expert() -> None:
    design = random_design(3, 8, 4)
    design[1] *= 1e30
    with pytest.raises(NumericalError, match="expert 1"):
        align_experts(design, torch.full((8, 4), 1e30))


@pytest.mark.parametrize("rows", [1, 2, 64, 700], ids=lambda n: f"I{n}")
def test_gap_certifies_the_optimum_and_nothing_else(rows: int) -> None:
    design = random_design(2, rows, 24, seed=1)
    gain = design[0] @ design[1].T
    columns = torch.from_numpy(linear_sum_assignment(-gain.double().numpy())[1])
    assert 0 <= certify(gain, columns).gap <= 1e-9 * gain.abs().sum()
    if rows > 1:
        worse = columns.clone()
        worse[[0, 1]] = worse[[1, 0]]
        index = torch.arange(rows)
        loss = (gain[index, columns] - gain[index, worse]).double().sum().item()
        assert loss > 0
        # Two cells apart, the sweeps climb a cycle without end: the bound must still be one.
        assert certify(gain, worse, max_sweeps=20).gap >= loss * (1 - 1e-6)


def test_a_solver_that_errs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    design = random_design(2, 30, 8)
    for name in ("solve_assignment", "solve_with_lapx"):
        monkeypatch.setattr(alignment, name, lambda cost: np.arange(len(cost)))
    with pytest.raises(NumericalError, match="expert 1: assignment not certified"):
        align_experts(design, design[0])


def test_where_one_solver_errs_the_other_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    design = random_design(2, 30, 8)
    right = align_experts(design, design[0])
    monkeypatch.setattr(alignment, "solve_assignment", lambda cost: np.arange(len(cost)))
    found = align_experts(design, design[0])
    assert torch.equal(found.perm, right.perm)
    assert found.gap.max() <= MAX_GAP


def test_a_small_rise_that_reaches_many_potentials_is_waited_for() -> None:
    """Duals of an earlier center are off by little in row 0, which only row 1 sees at first, and all others from there.

    The first sweep raises one potential, by less than it stops at; the bound after it is 254 times as far off.
    """
    rows = 256
    gain = torch.full((rows, rows), -1.0).fill_diagonal_(0)
    gain[0, 1] = 0
    gain[1, 2:] = 0
    center, weights = torch.eye(rows), gain.T.contiguous()
    columns = torch.zeros(rows, dtype=torch.float64)
    columns[0] = 0.09 * MAX_GAP * (weights - center).square().sum() / 2
    identity = torch.arange(rows)
    assert certify(gain, identity, columns[0].item(), start=columns).gap > 200 * columns[0]
    proof = (Certificate(0.0, columns, -columns),)
    found = align_experts(weights[None], center, Start(identity.roll(1)[None], proof))
    assert torch.equal(found.perm[0], identity)
    assert found.gap.max() <= MAX_GAP
