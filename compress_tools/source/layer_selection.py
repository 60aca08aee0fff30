"""``--layers``: which of a model's MoE layers."""

import re
from collections.abc import Collection

from compress_tools.errors import ConfigError

_NUMBER = re.compile(r"[0-9]{1,9}")


def select_layers(selection: str, moe_layers: list[int], drafts: Collection[int] = ()) -> list[int]:
    """Resolve ``--layers`` against a model's MoE layers.

    Args:
        selection: ``all``, ``decoder``, ``top:N``, ``bottom:N``, or comma-separated indices and ranges (``0-3,7``).
        moe_layers: indices of layers that hold experts, ascending.
        drafts: those of them that are for multi-token prediction; only ``all`` and their indices select them.
    Returns:
        the selected decoder layer indices, ascending.
    Raises:
        ConfigError: not understood, or names a layer without experts.
    """
    text = selection.strip().lower()
    if text == "all":
        return list(moe_layers)
    decoder = [layer for layer in moe_layers if layer not in drafts]
    if text == "decoder":
        return decoder
    end, colon, number = text.partition(":")
    if colon and end in ("top", "bottom") and _NUMBER.fullmatch(number):
        count = int(number)
        if not 1 <= count <= len(decoder):
            raise ConfigError(
                f"--layers {selection}: the model has {len(decoder)} MoE layers; ask for 1 or more of them"
            )
        return decoder[-count:] if end == "top" else decoder[:count]
    chosen: set[int] = set()
    for item in text.split(","):
        first, dash, last = item.strip().partition("-")
        numbers = all(_NUMBER.fullmatch(number) for number in (first, last or first)) and bool(dash) == bool(last)
        if not numbers or (dash and int(last) < int(first)):
            raise ConfigError(
                f"--layers {selection}: expected all, decoder, top:N, bottom:N, or indices and ranges such as 0-3,7"
            )
        # A number far beyond the model must not be counted up to.
        chosen.update(range(int(first), min(int(last or first), max(int(first), moe_layers[-1] + 1)) + 1))
    if unknown := chosen - set(moe_layers):
        raise ConfigError(
            f"--layers {selection}: no experts in layers {sorted(unknown)}; MoE layers are {_spans(moe_layers)}"
        )
    return sorted(chosen)


def _spans(indices: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2,5``."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
