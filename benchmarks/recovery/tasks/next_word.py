"""The questions of next_word.yaml as lm-eval reads them."""

from typing import Any

import datasets

from benchmarks.recovery.questions import questions


def items(**_options: Any) -> dict[str, datasets.Dataset]:
    """The split ``test``."""
    return {"test": datasets.Dataset.from_list(questions())}
