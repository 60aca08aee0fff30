"""Agreement and divergence on positions small enough to be counted by hand."""

import math

import pytest
import torch

from compress_tools.evaluation.predictions import Predictions, Scores, kl_divergence


def given(*positions: tuple[float, ...], target: int = 0) -> Predictions:
    """Predictions of these probabilities, one tuple for each position; the token that came is ``target``."""
    logprobs = torch.tensor(positions).log()
    return Predictions(logprobs[:, target], logprobs)


# The first position agrees on token 0; at the second the model prefers token 1.
ORIGINAL = (0.5, 0.25, 0.25), (0.5, 0.25, 0.25)
MODEL = (0.5, 0.25, 0.25), (0.25, 0.5, 0.25)
SECOND_KL = 0.5 * math.log(2) + 0.25 * math.log(0.5)


def test_two_positions_of_which_one_agrees() -> None:
    scores = Scores()
    scores.add(given(*MODEL), given(*ORIGINAL))
    assert scores.positions == 2
    assert scores.top1_agreement == 0.5
    assert scores.mean_kl == pytest.approx(SECOND_KL / 2)
    assert scores.perplexity == pytest.approx(math.sqrt(2 * 4))
    assert scores.original_perplexity == pytest.approx(2)


def test_windows_add_up() -> None:
    scores = Scores()
    for number in (0, 1, 1):
        scores.add(given(MODEL[number]), given(ORIGINAL[number]))
    assert (scores.positions, scores.top1_agreement) == (3, pytest.approx(1 / 3))
    assert scores.mean_kl == pytest.approx(2 * SECOND_KL / 3)
    assert scores.perplexity == pytest.approx((2 * 4 * 4) ** (1 / 3))


@pytest.mark.parametrize(
    ("count", "ranks"), [(1, (1, 1)), (99, (99, 50)), (100, (99, 50)), (101, (100, 51)), (250, (248, 125))]
)
def test_percentiles_are_divergences_found_by_nearest_rank(count: int, ranks: tuple[int, int]) -> None:
    """The rank is ceil(percent * N / 100), counted from the smallest."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    share = 0.5 + 0.4 * (order + 1) / count
    model = torch.stack([share, 1 - share], dim=1).log()
    same = torch.full((count, 2), 0.5).log()
    original, other = Predictions(same[:, 0], same), Predictions(model[:, 0], model)
    each = kl_divergence(original, other)
    scores = Scores()
    for window in torch.arange(count).tensor_split(3 if count > 2 else 1):
        scores.add(*(Predictions(one.target_logprobs[window], one.logprobs[window]) for one in (other, original)))
    assert scores.divergences.tolist() == each.float().tolist()
    ordered = each.float().sort().values.tolist()
    assert [scores.kl_percentile(99), scores.kl_percentile(50)] == [ordered[rank - 1] for rank in ranks]
    assert scores.max_kl == scores.kl_percentile(100) == ordered[-1]


def test_the_divergence_is_from_the_original() -> None:
    one, other = given((0.9, 0.1)), given((0.5, 0.5))
    assert kl_divergence(one, other).item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert kl_divergence(other, one).item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5))


def test_the_rest_is_one_bucket() -> None:
    original = Predictions(torch.zeros(1), torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[7, 3]]))
    model = Predictions(torch.zeros(1), torch.tensor([[0.5, 0.125]]).log(), torch.tensor([[3, 9]]))
    # Token 3 is in both lists; 7 and 9 are among the others, 0.75 of the original's and 0.5 of the model's.
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kl_divergence(original, model).item() == pytest.approx(expected)
    assert (original.best().tolist(), model.best().tolist()) == ([7], [3])


def test_distributions_that_were_not_asked_for() -> None:
    with pytest.raises(ValueError, match="were asked for"):
        Predictions(torch.zeros(1)).best()
