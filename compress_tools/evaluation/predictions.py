"""What a model predicted at scored positions, and what two models' predictions have in common."""

import math
from array import array
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

_LEAST_REST = 1e-9  # probability below which "all other tokens" is rounding


@dataclass(frozen=True)
class Predictions:
    """One model's next-token distributions at N positions.

    Attributes:
        target_logprobs: log-probability of the token that came, ``[N]`` fp32, in nats.
        logprobs: ``[N, V]`` fp32 in the vocabulary's order, or ``[N, K]`` of the K most probable tokens in any order;
            None if only targets were asked for.
        ids: the K tokens, ``[N, K]`` int64; None for the whole vocabulary.
    """

    target_logprobs: Tensor
    logprobs: Tensor | None = None
    ids: Tensor | None = None

    def distributions(self) -> Tensor:
        """``logprobs``, where they were asked for.

        Raises:
            ValueError: only targets were.
        """
        if self.logprobs is None:
            raise ValueError("only the targets' log-probabilities were asked for")
        return self.logprobs

    def best(self) -> Tensor:
        """The most probable token at each position, ``[N]`` int64."""
        best = self.distributions().argmax(dim=1)
        return best if self.ids is None else self.ids.gather(1, best[:, None])[:, 0]


def kl_divergence(original: Predictions, other: Predictions) -> Tensor:
    """KL(original || other) at each position, ``[N]`` float64, in nats.

    Exact over whole vocabularies. Otherwise over the tokens that both list, and one bucket for all others: merging
    outcomes only takes distance away, so this is a lower bound.
    """
    if original.ids is None and other.ids is None:
        own, theirs = original.distributions(), other.distributions()
        return (own.exp() * (own - theirs)).sum(dim=1, dtype=torch.float64)
    if original.ids is None or other.ids is None:
        raise ValueError("one model's whole vocabulary against the other's most probable tokens")
    order = other.ids.argsort(dim=1)
    known = other.ids.gather(1, order)
    place = torch.searchsorted(known, original.ids.contiguous()).clamp(max=known.shape[1] - 1)
    in_both = known.gather(1, place) == original.ids  # [N, K]
    own = original.distributions().double()
    theirs = other.distributions().double().gather(1, order.gather(1, place))
    # A token in one list alone adds nothing to either sum: it is among the others.
    terms = torch.where(in_both, own.exp() * (own - theirs), 0.0).sum(dim=1)
    rest, their_rest = (
        (1 - torch.where(in_both, one.exp(), 0.0).sum(dim=1)).clamp(min=_LEAST_REST) for one in (own, theirs)
    )
    return terms + rest * (rest / their_rest).log()


@dataclass
class Scores:
    """Sums over scored positions, float64, and each position's divergence.

    Attributes:
        divergences: KL(original || model) of each position in the order they came, fp32: 4 bytes a position.
    """

    positions: int = 0
    loss: float = 0.0
    original_loss: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    divergences: "array[float]" = field(default_factory=lambda: array("f"), repr=False)

    def add(self, predictions: Predictions, original: Predictions | None = None) -> None:
        """Count a window's positions."""
        self.positions += len(predictions.target_logprobs)
        self.loss -= predictions.target_logprobs.sum(dtype=torch.float64).item()
        if original is not None:
            self.original_loss -= original.target_logprobs.sum(dtype=torch.float64).item()
            divergence = kl_divergence(original, predictions)
            self.kl += divergence.sum().item()
            self.divergences.frombytes(divergence.float().cpu().numpy().tobytes())
            self.agreed += int((original.best() == predictions.best()).sum())

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-likelihood."""
        return math.exp(self.loss / self.positions)

    @property
    def original_perplexity(self) -> float:
        """The same of the original."""
        return math.exp(self.original_loss / self.positions)

    @property
    def mean_kl(self) -> float:
        """Mean KL(original || model) over positions, nats."""
        return self.kl / self.positions

    def kl_percentile(self, percent: int) -> float:
        """A percentile of the positions' KL by nearest rank, nats.

        The smallest divergence found that at least ``percent`` percent of the positions do not exceed: a value that was
        measured, never one between two (numpy's ``inverted_cdf``).

        Args:
            percent: 1 to 100; 100 is the maximum.
        """
        rank = -(-percent * self.positions // 100)
        return float(np.partition(np.frombuffer(self.divergences, dtype=np.float32), rank - 1)[rank - 1])

    @property
    def max_kl(self) -> float:
        """The largest KL of a position, nats."""
        return max(self.divergences)

    @property
    def top1_agreement(self) -> float:
        """Share of positions where both call the same token the most probable."""
        return self.agreed / self.positions
