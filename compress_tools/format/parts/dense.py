"""Rows stored as they are."""

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch

from compress_tools.format.parts.base import Part, PartSizes, Rows, Stored, TensorSpec

CENTER = "resmoe_center"


class DenseCenter(Part):
    """Center rows stored as they are, one ``[I, H]`` tensor per projection."""

    since: ClassVar = 1
    roles: ClassVar = {CENTER: "values"}
    kernel_coders: ClassVar = ()

    method: Literal["dense"] = "dense"

    def tensors(self, sizes: PartSizes) -> Iterator[TensorSpec]:
        """One matrix for each projection."""
        shape = sizes.intermediate_size, sizes.hidden_size
        for projection in self.projections:
            yield TensorSpec(None, projection, CENTER, shape, sizes.dtype, "values")

    def params(self, sizes: PartSizes) -> int:
        """All weights."""
        return len(self.projections) * sizes.intermediate_size * sizes.hidden_size

    def decode(self, stored: Stored, hidden_size: int, dtype: torch.dtype = torch.float32) -> Rows:
        """The rows; no copy where they are stored in ``dtype``."""
        del hidden_size
        return {projection: stored[projection, CENTER].to(dtype) for projection in self.projections}

    def describe(self) -> str:
        """See ``Part.describe``."""
        return "dense center"
