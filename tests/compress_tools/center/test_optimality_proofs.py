"""A guess is called optimal only where it is: against the exact solver, on copies, near copies and strangers."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from compress_tools.center.alignment import Start, align_experts
from compress_tools.center.barycenter import identity_perm
from compress_tools.center.optimality_proofs import is_certainly_optimal, rows_too_close
from compress_tools.numerics.products import row_distances
from tests.compress_tools.center.test_alignment import random_design


def is_optimal(center: torch.Tensor, aligned: torch.Tensor) -> bool:
    cost = torch.cdist(center.double(), aligned.double()).square().numpy()
    return cost.trace() <= cost[linear_sum_assignment(cost)].sum() * (1 + 1e-9)


def too_close(center: torch.Tensor, *experts: torch.Tensor) -> torch.Tensor | None:
    reach = torch.stack([row_distances(center, aligned) for aligned in experts]).amax(0).sqrt()
    return rows_too_close(center, reach, workers=2)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5, 0.7], ids=lambda n: f"noise{n}")
@pytest.mark.parametrize("rows", [1, 2, 65, 400], ids=lambda n: f"I{n}")
def test_near_copies_are_proved(rows: int, noise: float) -> None:
    center, other = random_design(2, rows, 640)
    aligned = center + noise * other
    assert is_optimal(center, aligned)
    assert is_certainly_optimal(center, aligned)


@st.composite
def matched_rows(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Center and aligned rows: copies, each moved by a distance of its own, some of them exchanged."""
    rows, columns = draw(st.integers(2, 40)), draw(st.integers(1, 6))
    center, other = random_design(2, rows, columns, seed=draw(st.integers(0, 2**20)))
    reach = draw(st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.3, 1.0, 3.0]), min_size=rows, max_size=rows))
    aligned = center + torch.tensor(reach)[:, None] * other
    if draw(st.booleans()):
        one, two = draw(st.lists(st.integers(0, rows - 1), min_size=2, max_size=2, unique=True))
        aligned[[one, two]] = aligned[[two, one]]
    return center, aligned


BOUNDED = settings(max_examples=150)


@BOUNDED
@given(matched_rows())
@example((torch.tensor([[0.0], [0.8]]), torch.tensor([[1.0], [0.8]])))
def test_nothing_false_is_proved(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """By neither proof, nor by the second where the first left rows open."""
    center, aligned = pair
    optimal = is_optimal(center, aligned)
    close = too_close(center, aligned)
    assert optimal or not is_certainly_optimal(center, aligned)
    assert optimal or close is None or not is_certainly_optimal(center, aligned, close)


@BOUNDED
@given(matched_rows(), st.data())
def test_a_swap_that_gains_is_never_cleared(pair: tuple[torch.Tensor, torch.Tensor], data: st.DataObject) -> None:
    """Exchanging two rows of near copies loses a known amount: both rows are left open, and nothing is proved."""
    center, _ = pair
    one, two = data.draw(st.lists(st.integers(0, len(center) - 1), min_size=2, max_size=2, unique=True))
    aligned = center.clone()
    aligned[[one, two]] = aligned[[two, one]]
    loss = 2 * (center[one] - center[two]).double().square().sum()
    assert loss > 0
    close = too_close(center, aligned)
    assert close is None or {one, two} <= set(close.tolist())
    assert not is_certainly_optimal(center, aligned)
    assert not is_certainly_optimal(center, aligned, torch.tensor(sorted((one, two))))


def test_a_row_that_moved_past_another_is_left_open() -> None:
    """Row 0's partner lies beyond row 1's: 0.68 by exchanging them, 1 as matched."""
    center, aligned = torch.tensor([[0.0], [0.8]]), torch.tensor([[1.0], [0.8]])
    assert not is_optimal(center, aligned)
    assert not is_certainly_optimal(center, aligned)
    # Among rows that are far away and copied exactly, these two alone are left open.
    far = 100 * torch.arange(1.0, 41.0)[:, None]
    close = too_close(torch.cat([center, far]), torch.cat([aligned, far]))
    assert close.tolist() == [0, 1]
    assert not is_certainly_optimal(torch.cat([center, far]), torch.cat([aligned, far]), close)


def test_strangers_and_swapped_rows_are_not_proved() -> None:
    center, other = random_design(2, 300, 64)
    assert not is_certainly_optimal(center, other)
    swapped = center.clone()
    swapped[[10, 200]] = swapped[[200, 10]]
    assert not is_certainly_optimal(center, swapped)


def test_one_bad_row_among_good_ones_is_seen() -> None:
    """Not among the sampled rows: the full pass must see it."""
    center, other = random_design(2, 1000, 64)
    aligned = center + 0.05 * other
    aligned[[501, 777]] = aligned[[777, 501]]
    assert not is_certainly_optimal(center, aligned)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.1], ids=lambda n: f"noise{n}")
@pytest.mark.parametrize("rows", [1, 2, 65, 400], ids=lambda n: f"I{n}")
def test_the_centers_own_distances_prove_near_copies(rows: int, noise: float) -> None:
    center, *others = random_design(4, rows, 640)
    experts = [center + noise * other for other in others]
    assert too_close(center, *experts).tolist() == []
    assert all(is_optimal(center, aligned) for aligned in experts)


def test_two_rows_that_lie_too_close_are_left_open() -> None:
    """In different blocks, neither among the sampled ones; the others stay proved, and these two by a second look."""
    center, other = random_design(2, 2000, 256)
    center[1777] = center[501] + 0.05 * other[1777]
    aligned = center + 0.04 * other
    close = too_close(center, aligned)
    assert close.tolist() == [501, 1777]
    assert is_optimal(center, aligned) == is_certainly_optimal(center, aligned, close)
    swapped = aligned.clone()
    swapped[[501, 1777]] = aligned[[1777, 501]]
    assert not is_certainly_optimal(center, swapped, close)


def test_strangers_are_given_up_after_the_sample() -> None:
    assert too_close(*random_design(2, 300, 64)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_guesses_and_duals_change_the_time_not_the_result(dtype: torch.dtype) -> None:
    """A warm start from another center: the same cost as from nothing, certified."""
    design = random_design(3, 300, 40, seed=5).to(dtype)
    center = random_design(1, 300, 40, seed=6)[0]
    cold = align_experts(design, center)
    moved = center + 0.2 * random_design(1, 300, 40, seed=7)[0]
    warm = align_experts(design, moved, Start(cold.perm, cold.proof))
    fresh = align_experts(design, moved)
    torch.testing.assert_close(warm.distance, fresh.distance, rtol=1e-6, atol=0)
    assert warm.gap.max() <= 1e-6
    again = align_experts(design, moved, Start(fresh.perm, fresh.proof))
    assert torch.equal(again.perm, fresh.perm)


@pytest.mark.parametrize("prove_from_rows", [1, 10_000])
def test_a_right_guess_needs_no_solver(monkeypatch: pytest.MonkeyPatch, prove_from_rows: int) -> None:
    """Few rows: the whole product shows it in one sweep. Many: a share of the columns proves it."""
    monkeypatch.setattr("compress_tools.center.alignment.PROVE_FROM_ROWS", prove_from_rows)
    base, *others = random_design(5, 300, 64)
    design = torch.stack([base + 0.1 * other for other in others])
    monkeypatch.setattr("compress_tools.center.alignment.solve_assignment", lambda cost: 1 / 0)
    found = align_experts(design, base, Start(identity_perm(4, 300)))
    assert torch.equal(found.perm, identity_perm(4, 300))
    assert found.gap.max() <= 1e-12
