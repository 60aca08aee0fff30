"""A long text cut into windows that a model can see at once; each token but the first is scored exactly once."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Window:
    """One stretch of tokens.

    Attributes:
        tokens: what the model sees, ``[L]`` int64.
        first: index of the first token that is scored; those before it are context. At least 1.
    """

    tokens: Tensor
    first: int

    @property
    def targets(self) -> Tensor:
        """The scored tokens, ``[L - first]`` int64."""
        return self.tokens[self.first :]


def cut_windows(tokens: Tensor, window: int, stride: int) -> list[Window]:
    """Cut tokens ``[N]`` into windows of at most ``window``, begun every ``stride`` tokens: N - 1 are scored.

    Each scored token but those of the first window has at least ``window - stride`` tokens before it (1 at least:
    where windows do not overlap, a window begins with the last token of the one before).

    Args:
        tokens: ``[N]``, N at least 2.
        window: at least 2.
        stride: from 1 to ``window``.
    """
    stride = min(stride, window - 1)
    windows: list[Window] = []
    scored = 1  # tokens scored so far; nothing predicts the first
    for begin in range(0, len(tokens) - 1, stride):
        end = min(begin + window, len(tokens))
        windows.append(Window(tokens[begin:end], scored - begin))
        scored = end
        if end == len(tokens):
            break
    return windows
