"""Every weight as a code of few bits, with a scale for each group of a row's columns."""

from abc import ABC
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch

from compress_tools.format.parts.base import (
    Bits,
    CodedRows,
    GroupSize,
    Part,
    PartSizes,
    Rows,
    Stored,
    TensorSpec,
    describe_codes,
)

CENTER_CODES = "resmoe_center_codes"
CENTER_SCALES = "resmoe_center_scales"
CODES = "resmoe_codes"
SCALES = "resmoe_scales"


class _Quantized(Part, ABC):
    since: ClassVar = 2
    stored_as: ClassVar[CodedRows]

    method: Literal["quantized"] = "quantized"
    bits: Bits
    group_size: GroupSize | None = None

    def tensors(self, sizes: PartSizes) -> Iterator[TensorSpec]:
        """Codes and scales of each projection."""
        for projection in self.projections:
            yield from self.stored_as.tensors(
                projection, sizes.intermediate_size, sizes.hidden_size, self.bits, self.group_size
            )

    def params(self, sizes: PartSizes) -> int:
        """All weights."""
        return len(self.projections) * sizes.intermediate_size * sizes.hidden_size

    def decode(self, stored: Stored, hidden_size: int, dtype: torch.dtype = torch.float32) -> Rows:
        """Levels times scales."""
        return {
            projection: self.stored_as.decode(stored, projection, hidden_size, self.bits, self.group_size).to(dtype)
            for projection in self.projections
        }


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
