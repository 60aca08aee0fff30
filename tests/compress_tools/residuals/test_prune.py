"""Which values pruning keeps: exact counts and the lowest places among ties, where only a sample is sorted too."""

import numpy as np
import pytest
import torch

from compress_tools.residuals import prune
from compress_tools.residuals.prune import largest_magnitudes

# More values than are looked at one by one, and no multiple of the sample's.
LARGE = (1 << 20) + 17
STEP = LARGE // (1 << 16)


def by_sorting(values: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the largest magnitudes; of equal ones the first."""
    order = torch.sort(values.abs(), descending=True, stable=True).indices
    return torch.zeros(len(values), dtype=torch.bool).index_fill_(0, order[:count], True)


def drawn(kind: str) -> torch.Tensor:
    values = torch.randn(LARGE, generator=torch.Generator().manual_seed(11))
    if kind == "ties":  # 60 or so different magnitudes
        return (values * 16).round() / 16
    if kind == "sorted":  # the sample's quantiles are the values' own
        return values.sort().values
    return values


@pytest.mark.parametrize("kind", ["gaussian", "ties", "sorted"])
@pytest.mark.parametrize("count", [1, 1025, LARGE // 3, LARGE - 1])
def test_counts_are_exact_where_a_sample_is_sorted(kind: str, count: int) -> None:
    values = drawn(kind)
    keep = largest_magnitudes(values.view(1, -1), count)
    assert int(keep.sum()) == count
    assert torch.equal(keep[0], by_sorting(values, count))


@pytest.mark.parametrize("sampled_are", ["smallest", "largest"])
@pytest.mark.parametrize("beside", [-2, -1, 0, 1, 2])
def test_a_sample_that_misleads_costs_time_and_nothing_else(sampled_are: str, beside: int) -> None:
    """Every sampled value is the same, so the band is one value: what is sought lies in it, at its edge or outside."""
    values = 2 + torch.rand(LARGE, generator=torch.Generator().manual_seed(3))
    values[::STEP] = 1 if sampled_are == "smallest" else 4
    equal = len(values[::STEP])
    count = (LARGE - equal if sampled_are == "smallest" else equal) + beside
    assert torch.equal(largest_magnitudes(values, count), by_sorting(values, count))


@pytest.mark.parametrize("count", [1025, LARGE // 4, LARGE // 2, LARGE - 1025])
def test_of_many_values_only_a_band_is_selected_from(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what the sample is for: selection takes ten times as long from all."""
    looked_at: list[int] = []
    partition = np.partition

    def recorded(values: np.ndarray, rank: int) -> np.ndarray:
        looked_at.append(len(values))
        return partition(values, rank)

    monkeypatch.setattr(prune.np, "partition", recorded)
    largest_magnitudes(drawn("gaussian"), count)
    assert len(looked_at) == 1
    # 2^10 sampled values to either side, each of which stands for STEP
    assert looked_at[0] < 2.2 * (1 << 10) * STEP


@pytest.mark.parametrize("at_once", [1, 7, 40, 1000])
def test_ties_go_to_the_first_rows_however_few_are_looked_at_together(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune, "_TIES_AT_ONCE", at_once)
    values = torch.randint(-3, 4, (20, 9), generator=torch.Generator().manual_seed(at_once)).float()
    for count in range(1, values.numel() + 1):
        assert torch.equal(largest_magnitudes(values, count).flatten(), by_sorting(values.flatten(), count))


def test_all_equal_values_are_kept_from_the_start() -> None:
    for count in (1, 5, LARGE - 1, LARGE):
        keep = largest_magnitudes(torch.full((1, LARGE), -0.5), count)[0]
        assert keep[:count].all()
        assert not keep[count:].any()
