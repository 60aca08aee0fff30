"""The task's questions: a piece of held-out code, and the word that comes next."""

import random
import re
from collections import Counter

from benchmarks.models.reference_models.corpus import read_corpus

QUESTIONS = 2000
# Characters before a word; with it they fit a reference model's context of 256 tokens, of which each is one at least.
BEFORE = 160


def questions(text: str | None = None) -> list[dict[str, str]]:
    """The same at each call and for each model.

    Args:
        text: what they are drawn from; by default the modules of this Python's standard library that reference models
            are not trained on.
    Returns:
        of each its ``context`` and the ``word`` behind it, with the blank before it.
    """
    text = read_corpus().heldout_text() if text is None else text
    places = [found.span() for found in re.finditer(r"(?<=\S) [A-Za-z_]{2,}", text) if found.start() >= BEFORE]
    return [
        {"context": text[start - BEFORE : start], "word": text[start:end]}
        for start, end in random.Random(0).sample(places, QUESTIONS)
    ]


def best_constant(asked: list[dict[str, str]]) -> float:
    """The share of right answers of who says the same word each time, the best one for it."""
    return Counter(question["word"] for question in asked).most_common(1)[0][1] / len(asked)
