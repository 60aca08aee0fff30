"""The center by law and against POT's own free-support solver."""

import numpy as np
import ot
import pytest
import torch

from compress_tools.center.assignment import MAX_GAP
from compress_tools.center.barycenter import CenterOptions, barycenter, find_center, spread
from tests.compress_tools.center.test_alignment import random_design


def test_two_one_row_experts_meet_at_the_midpoint() -> None:
    design = torch.tensor([[[0.0, 2.0]], [[4.0, 0.0]]])
    found = barycenter(design)
    assert torch.equal(found.center, torch.tensor([[2.0, 1.0]]))
    assert found.objective[-1] == 10.0


def test_permuted_copies_leave_no_residual() -> None:
    base = random_design(1, 33, 9)[0]
    design = torch.stack([base[torch.randperm(33, generator=torch.Generator().manual_seed(s))] for s in range(5)])
    found = barycenter(design)
    for expert in range(5):
        torch.testing.assert_close(design[expert][found.perm[expert]], found.center)


def test_one_expert_is_its_own_center() -> None:
    design = random_design(1, 12, 5)
    found = barycenter(design)
    assert torch.equal(design[0][found.perm[0]], found.center)


@pytest.mark.parametrize(("experts", "rows", "columns"), [(2, 8, 3), (4, 32, 6), (8, 64, 4), (3, 200, 5)])
def test_objective_falls_and_is_what_the_result_has(experts: int, rows: int, columns: int) -> None:
    design = random_design(experts, rows, columns, seed=rows)
    found = barycenter(design, CenterOptions(tolerance=0.0))
    assert all(later < earlier for earlier, later in zip(found.objective, found.objective[1:], strict=False))
    assert spread(design, found.perm, found.center) == pytest.approx(found.objective[-1], rel=1e-9)
    mean = find_center(design, CenterOptions("mean"))
    assert found.objective[-1] < mean.objective[-1]
    none = find_center(design, CenterOptions("none"))
    assert none.center is None
    assert mean.objective[-1] < none.objective[-1]


@pytest.mark.parametrize(("experts", "rows", "columns"), [(2, 6, 2), (3, 16, 4), (5, 48, 3)])
def test_not_worse_than_pot(experts: int, rows: int, columns: int) -> None:
    design = random_design(experts, rows, columns, seed=7 * rows)
    measures = [expert.double().numpy() for expert in design]
    weights = [np.full(rows, 1 / rows)] * experts
    support = ot.lp.free_support_barycenter(measures, weights, measures[0].copy(), numItermax=100, stopThr=0)
    theirs = sum(ot.emd2(weights[0], weights[0], ot.dist(support, cloud)) for cloud in measures) * rows
    assert barycenter(design, CenterOptions(max_iterations=100, tolerance=0.0)).objective[-1] <= theirs * (1 + 1e-6)


def test_git_rebasin_center_is_the_mean_after_one_matching_to_expert_0() -> None:
    design = random_design(4, 40, 6, seed=3)
    found = find_center(design, CenterOptions("git-rebasin"))
    assert torch.equal(found.perm[0], torch.arange(40))
    aligned = torch.stack([expert[perm] for expert, perm in zip(design, found.perm, strict=True)])
    torch.testing.assert_close(found.center, aligned.mean(0))
    mean = find_center(design, CenterOptions("mean"))
    best = barycenter(design, CenterOptions(tolerance=0.0))
    assert best.objective[-1] <= found.objective[-1] < mean.objective[-1]


def test_noisy_copies_keep_their_order_and_need_one_start() -> None:
    base, *others = random_design(5, 300, 64, seed=2)
    design = torch.stack([base + 0.2 * other for other in others])
    found = barycenter(design)
    assert torch.equal(found.perm, torch.arange(300).expand(4, 300))
    torch.testing.assert_close(found.center, design.mean(0))
    assert found.start == "expert 0"


def test_bf16_weights_give_the_center_of_their_values() -> None:
    design = random_design(3, 40, 12, seed=4).bfloat16()
    low, full = barycenter(design), barycenter(design.float())
    assert torch.equal(low.perm, full.perm)
    assert torch.equal(low.center, full.center)


# How far experts are from copies of each other, as shares of their energy.
SHARES = (0.0, 1e-14, 1e-10, 1e-9, 1e-8, 1e-6, 1e-3, 0.1, 0.5, 0.8, 0.95, 1.0)


def layer(kind: str, share: float, seed: int) -> torch.Tensor:
    """Experts that hold ``share`` of their energy apart, half of the layers with shuffled rows: ``[E, I, D]``."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*sizes: int) -> int:
        return sizes[int(torch.randint(len(sizes), (1,), generator=generator))]

    experts, rows, columns = pick(2, 5), pick(2, 5, 17, 40), pick(1, 2, 6, 24, 100)
    base, *own = torch.randn(experts + 1, rows, columns, generator=generator)
    if kind == "rows of very different size":
        size = torch.exp(4 * torch.randn(experts + 1, rows, 1, generator=generator))
        base, own = base * size[0], [each * factor for each, factor in zip(own, size[1:], strict=True)]
    elif kind == "repeated rows":
        base = base[torch.randint(max(1, rows // 4), (rows,), generator=generator)]
    elif kind == "far from zero":
        base = base + 100
    elif kind == "dead rows":
        base[rows // 2 :] = 0
    design = torch.stack([(1 - share) ** 0.5 * base + share**0.5 * each for each in own])
    if kind == "on a grid":
        design = (2 * design).round() / 2
    if pick(0, 1):
        design = torch.stack([expert[torch.randperm(rows, generator=generator)] for expert in design])
    return design


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(
    "kind", ["plain", "rows of very different size", "repeated rows", "far from zero", "dead rows", "on a grid"]
)
def test_no_layer_ends_in_an_error(kind: str, share: float) -> None:
    """Rounding that a solver or a proof leaves is settled, not refused, and the center is never worse than the mean."""
    for seed in range(4):
        design = layer(kind, share, seed)
        found = barycenter(design)
        assert found.gap <= MAX_GAP
        assert torch.equal(found.perm.sort(dim=1).values, torch.arange(design.shape[1]).expand_as(found.perm))
        mean = find_center(design, CenterOptions("mean")).objective[-1]
        rounding = 1e-6 * design.double().square().sum().item()
        assert found.objective[-1] <= mean + rounding
