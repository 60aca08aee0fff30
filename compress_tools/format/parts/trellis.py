"""Every weight as a symbol of a trellis code, with a scale for each group of a row's columns."""

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from compress_tools.format.parts.base import (
    CodedRows,
    Projection,
    Role,
    Stored,
    describe_codes,
)
from compress_tools.format.parts.coded import CodedPart
from compress_tools.format.trellis import decode_trellis, state_levels

CENTER_TRELLIS = "resmoe_center_trellis"
CENTER_TRELLIS_SCALES = "resmoe_center_trellis_scales"
TRELLIS = "resmoe_trellis"
TRELLIS_SCALES = "resmoe_trellis_scales"

TrellisBits = Literal[1, 2, 3, 4]


@dataclass(frozen=True)
class TrellisRows(CodedRows):
    """Rows stored as packed symbols with scales, under two suffixes."""

    role: ClassVar[Role] = "symbols"

    def largest_level(self, bits: int) -> float:
        """See ``CodedRows``."""
        return float(state_levels(bits).abs().max())

    def decode(
        self, stored: Stored, projection: Projection, columns: int, bits: int, group_size: int | None = None
    ) -> Tensor:
        """See ``decode_trellis``; fp32 ``[rows, columns]``."""
        packed, scales = stored[projection, self.codes], stored[projection, self.scales]
        return decode_trellis(packed, scales, bits, columns, group_size)


class _Trellis(CodedPart, ABC):
    since: ClassVar = 3

    method: Literal["trellis"] = "trellis"
    bits: TrellisBits


class TrellisCenter(_Trellis):
    """Center rows as trellis codes."""

    stored_as: ClassVar = TrellisRows(CENTER_TRELLIS, CENTER_TRELLIS_SCALES)
    roles: ClassVar = stored_as.roles
    kernel_coders: ClassVar = ("trellis_center",)

    def describe(self) -> str:
        """See ``Part.describe``."""
        return f"{describe_codes(self.bits, self.group_size)} trellis center"


class TrellisResidual(_Trellis):
    """Residual rows as trellis codes."""

    stored_as: ClassVar = TrellisRows(TRELLIS, TRELLIS_SCALES)
    roles: ClassVar = stored_as.roles
    kernel_coders: ClassVar = ("trellis",)

    def describe(self) -> str:
        """See ``Part.describe``."""
        return self.words(describe_codes(self.bits, self.group_size))
