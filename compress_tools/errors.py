"""The error tree. Every message says what, where, what was expected, what was found, and the way out."""


class ResMoEError(Exception):
    """Base of everything this project raises on purpose.

    ``exit_code`` is what the ``resmoe`` command returns when the error reaches it.
    """

    exit_code = 1


class ConfigError(ResMoEError, ValueError):
    """The request itself is wrong: an option, a recipe, a combination."""

    exit_code = 2


class UnsupportedArchitectureError(ResMoEError):
    """The model is not an MoE, or of a family this version does not know."""

    exit_code = 3


class CheckpointError(ResMoEError):
    """A checkpoint can't be read or written: missing, truncated, incomplete, no space."""

    exit_code = 4


class FormatError(CheckpointError):
    """A ResMoE checkpoint disagrees with the format's SPEC."""


class NumericalError(ResMoEError):
    """Weights or results are not finite, or a solver did not converge."""

    exit_code = 5


class KernelUnsupportedError(ResMoEError):
    """No kernel exists for the asked method, dtype, device or activation."""
