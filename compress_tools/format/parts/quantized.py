"""Every weight as a code of few bits, with a scale for each group of a row's columns."""

from abc import ABC
from typing import ClassVar, Literal

from compress_tools.format.parts.base import (
    Bits,
    CodedRows,
    describe_codes,
)
from compress_tools.format.parts.coded import CodedPart

CENTER_CODES = "resmoe_center_codes"
CENTER_SCALES = "resmoe_center_scales"
CODES = "resmoe_codes"
SCALES = "resmoe_scales"


class _Quantized(CodedPart, ABC):
    since: ClassVar = 2

    method: Literal["quantized"] = "quantized"
    bits: Bits


class QuantizedCenter(_Quantized):
    """Center rows as codes and scales."""

    stored_as: ClassVar = CodedRows(CENTER_CODES, CENTER_SCALES)
    roles: ClassVar = stored_as.roles
    kernel_coders: ClassVar = ("quantized_center",)

    def describe(self) -> str:
        """See ``Part.describe``."""
        return f"{describe_codes(self.bits, self.group_size)} center"


class QuantizedResidual(_Quantized):
    """Residual rows as codes and scales."""

    stored_as: ClassVar = CodedRows(CODES, SCALES)
    roles: ClassVar = stored_as.roles
    kernel_coders: ClassVar = ("quantized",)

    def describe(self) -> str:
        """See ``Part.describe``."""
        return self.words(describe_codes(self.bits, self.group_size))
