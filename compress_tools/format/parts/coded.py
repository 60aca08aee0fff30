"""What plain and trellis codes have in common: every weight as a code of few bits, scales by groups of columns."""

from abc import ABC
from collections.abc import Iterator
from typing import ClassVar

import torch

from compress_tools.format.parts.base import CodedRows, GroupSize, Part, PartSizes, Rows, Stored, TensorSpec


class CodedPart(Part, ABC):
    """All rows of all its projections in codes.

    Attributes:
        stored_as: under which suffixes, and what codes mean.
        bits: of a code; each kind says which it has.
        group_size: columns that share a scale; None for the whole row.
    """

    stored_as: ClassVar[CodedRows]

    bits: int
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
