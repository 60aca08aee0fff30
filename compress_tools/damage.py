"""When a result is warned of, and when it is refused: relative errors at which little of a model is left."""

from collections.abc import Mapping
from typing import Final

from compress_tools.errors import ConfigError

# Mean squared error relative to the weights' energy; 1 is what dropping all experts loses. On the quality page's two
# models 0.04 (plain 3-bit codes) adds 1 % to the perplexity, 0.16 adds 8 to 14 %, and from 0.27 on no method of the
# page adds less than 5 %, most of them 15 to 40 %. Larger models bear less: they fall apart in plain 2-bit codes, 0.12.
WARNED_ERROR: Final = 0.3
# No method comes here at its default settings, whatever the model: the worst is low rank at 25 % of the parameters with
# 0.66, of square matrices of noise (0.48 to 0.52 on the quality page). Who gets here has asked for too few bytes.
RUINED_ERROR: Final = 0.75


def mean(errors: Mapping[int, float]) -> float:
    """Plain mean over layers."""
    return sum(errors.values()) / max(len(errors), 1)


def damage_warning(errors: Mapping[int, float]) -> str | None:
    """A sentence about a result's relative errors by layer; None where there is nothing to say."""
    found = mean(errors)
    lost = [layer for layer, error in errors.items() if error > RUINED_ERROR]
    if found <= WARNED_ERROR and not lost:
        return None
    state = "the model is ruined" if found > RUINED_ERROR else "expect clearly worse answers"
    named = f" (layers {', '.join(map(str, lost))} are ruined)" if lost and found <= RUINED_ERROR else ""
    return (
        f"WARNING: mean relative error {found:.2f}{named}: {state}. Plain 2-bit codes lose 0.12, and 1 is what "
        "dropping all experts loses. Give it more bytes, or measure it: resmoe eval DST --text FILE --against SRC"
    )


def refusal(error: float, what: str, kept: str) -> ConfigError:
    """The error that refuses a ruined result.

    Args:
        error: mean relative error.
        what: which layers have it, or would.
        kept: what is kept, and for which command.
    """
    return ConfigError(
        f"mean relative error {error:.2f} {what}: the model is ruined (above {RUINED_ERROR}; plain 2-bit codes lose "
        f"0.12, 1 is what dropping all experts loses). Give it more bytes (a larger --target-bytes-ratio or "
        f"--target-size, or another method), or insist: {kept}"
    )
