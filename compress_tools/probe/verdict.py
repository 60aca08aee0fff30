"""From measured shares and predicted errors to a plain answer, by rule.

1. Something is shared when residual energy is at least ``MIN_SHARED`` below that of unrelated random experts that
   were sampled and aligned in the same way.
2. At one size a center pays when something is shared and the best coder with a center has at most ``MAX_ERROR`` of
   the error of the best coder without one. Both must fit into the same bytes.
3. The answer is "yes" when it pays at every asked size, "no" when at none, else "in part".
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

MIN_SHARED = 0.05
MAX_ERROR = 0.9


@dataclass(frozen=True)
class Prediction:
    """A coder's error at a size.

    Attributes:
        coder: method of the command line.
        center_bits: of the center that all experts share, 16 is the model's dtype; None without a center.
        bytes_ratio: asked, of the experts' bytes.
        used_ratio: what the coder takes of it: center, values, masks, scales.
        setting: what the bytes bought.
        error: squared error over weight energy, all E experts.
    """

    coder: str
    center_bits: int | None
    bytes_ratio: float
    used_ratio: float
    setting: str
    error: float

    @classmethod
    def mean(cls, ones: list[Self]) -> Self:
        """The same coder at the same size in several layers: mean error."""
        first = ones[0]
        error = sum(one.error for one in ones) / len(ones)
        return cls(first.coder, first.center_bits, first.bytes_ratio, first.used_ratio, first.setting, error)

    @property
    def title(self) -> str:
        """Coder and setting for people."""
        center = f"{center_title(self.center_bits)} center, " if self.center_bits else ""
        return f"{center}{self.coder}, {self.setting}"


def center_title(center_bits: int | None) -> str:
    """``no`` or ``8-bit``."""
    return "no" if center_bits is None else f"{center_bits}-bit"


@dataclass(frozen=True)
class SizeVerdict:
    """At one size: the best coders that fit, None where none does, and whether the center pays."""

    bytes_ratio: float
    with_center: Prediction | None
    without_center: Prediction | None
    pays: bool


@dataclass(frozen=True)
class Verdict:
    """The answer.

    Attributes:
        center_pays: at all asked sizes, at some, at none.
        residual: residual share of all E experts, extrapolated; mean over sampled layers.
        control_residual: the same of unrelated random experts.
        shared: ``1 - residual / control_residual``: 1 for equal experts, 0 for unrelated ones.
        sizes: by asked size, ascending.
        sentences: the answer in words.
    """

    center_pays: Literal["yes", "in part", "no"]
    residual: float
    control_residual: float
    shared: float
    sizes: list[SizeVerdict]
    sentences: list[str]


def judge(residual: float, control_residual: float, ratios: Iterable[float], predictions: list[Prediction]) -> Verdict:
    """Apply the rules above.

    Args:
        residual: residual over weight energy of all E experts.
        control_residual: the same of unrelated experts.
        ratios: the asked sizes; at one where no coder fits no center pays.
        predictions: every coder that fits, at every size.
    """
    shared = 1 - residual / control_residual if control_residual else 0.0
    sizes = []
    for ratio in sorted(ratios):
        here = [one for one in predictions if one.bytes_ratio == ratio]
        with_center = _best([one for one in here if one.center_bits is not None])
        without = _best([one for one in here if one.center_bits is None])
        better = with_center is not None and (without is None or with_center.error <= MAX_ERROR * without.error)
        sizes.append(SizeVerdict(ratio, with_center, without, shared >= MIN_SHARED and better))
    paying = [size for size in sizes if size.pays]
    answer: Literal["yes", "in part", "no"] = "no" if not paying else "yes" if len(paying) == len(sizes) else "in part"
    sentences = [
        f"Experts share {1 - residual:.1%} of their energy; unrelated ones would share {1 - control_residual:.1%}."
    ]
    if shared < MIN_SHARED:
        sentences.append("They are as unrelated as random matrices: a center does not pay; use plain quantisation.")
    elif answer == "no":
        sentences.append("A center does not pay at any asked size.")
    elif answer == "yes":
        sentences.append("A center pays at every asked size.")
    else:
        sentences.append(
            f"A center pays at {_sizes(sizes, pays=True)} of the bytes, not at {_sizes(sizes, pays=False)}."
        )
    sentences += [_size_sentence(size) for size in sizes]
    return Verdict(answer, residual, control_residual, shared, sizes, sentences)


def _best(predictions: list[Prediction]) -> Prediction | None:
    return min(predictions, key=lambda one: one.error, default=None)


def _sizes(sizes: list[SizeVerdict], *, pays: bool) -> str:
    return ", ".join(f"{size.bytes_ratio:.1%}" for size in sizes if size.pays is pays)


def _size_sentence(size: SizeVerdict) -> str:
    def say(one: Prediction | None) -> str:
        return "nothing fits" if one is None else f"error {one.error:.3g} ({one.title})"

    return (
        f"At {size.bytes_ratio:.1%} of the bytes: with a center {say(size.with_center)}; "
        f"without {say(size.without_center)}."
    )
