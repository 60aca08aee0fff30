"""A product of two thin factors, one of them shared by the part's projections."""

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from compress_tools.format.parts.base import CodedRows, Part, PartSizes, Projection, Rows, Stored, TensorSpec
from compress_tools.numerics.products import product

U = "resmoe_u"
V = "resmoe_v"
U_CODES = "resmoe_u_codes"
V_CODES = "resmoe_v_codes"
U_SCALES = "resmoe_u_scales"
V_SCALES = "resmoe_v_scales"

CODED_U = CodedRows(U_CODES, U_SCALES)
CODED_V = CodedRows(V_CODES, V_SCALES)


class LowRankResidual(Part):
    """``U @ V``: U ``[I, R]`` shared by the group's projections, V ``[R, H]`` for each.

    ``factor_bits``: factors as codes with one scale for each row.
    """

    since: ClassVar = 1
    keys_since: ClassVar = {"factor_bits": 2}
    roles: ClassVar = {U: "values", V: "values", **CODED_U.roles, **CODED_V.roles}
    kernel_coders: ClassVar = ("low_rank", "low_rank_codes")

    method: Literal["low_rank"] = "low_rank"
    rank: PositiveInt
    factor_bits: Literal[8] | None = None

    @property
    def kernel_coder(self) -> str:
        """Factors in codes are a coder of their own."""
        plain, coded = self.kernel_coders
        return plain if self.factor_bits is None else coded

    def tensors(self, sizes: PartSizes) -> Iterator[TensorSpec]:
        """U under the first projection, then V of each."""
        size_i, size_h, first = sizes.intermediate_size, sizes.hidden_size, self.projections[0]
        if self.factor_bits is None:
            yield TensorSpec(None, first, U, (size_i, self.rank), sizes.dtype, "values")
        else:
            yield from CODED_U.tensors(first, size_i, self.rank, self.factor_bits)
        for projection in self.projections:
            if self.factor_bits is None:
                yield TensorSpec(None, projection, V, (self.rank, size_h), sizes.dtype, "values")
            else:
                yield from CODED_V.tensors(projection, self.rank, size_h, self.factor_bits)

    def params(self, sizes: PartSizes) -> int:
        """Both factors."""
        return self.rank * (sizes.intermediate_size + len(self.projections) * sizes.hidden_size)

    def decode(self, stored: Stored, hidden_size: int, dtype: torch.dtype = torch.float32) -> Rows:
        """``U @ V`` for each projection."""
        left = self.left_factor(stored)
        return {
            projection: product(left, self.right_factor(stored, projection, hidden_size)).to(dtype)
            for projection in self.projections
        }

    def left_factor(self, stored: Stored) -> Tensor:
        """U, fp32 ``[I, R]``."""
        first = self.projections[0]
        if self.factor_bits is None:
            return stored[first, U].float()
        return CODED_U.decode(stored, first, self.rank, self.factor_bits)

    def right_factor(self, stored: Stored, projection: Projection, hidden_size: int) -> Tensor:
        """V of one projection, fp32 ``[R, H]``."""
        if self.factor_bits is None:
            return stored[projection, V].float()
        return CODED_V.decode(stored, projection, hidden_size, self.factor_bits)

    def describe(self) -> str:
        """See ``Part.describe``."""
        coded = [] if self.factor_bits is None else [f"{self.factor_bits}-bit factors"]
        return self.words(f"rank {self.rank}", *coded)

    def size_fault(self, sizes: PartSizes) -> str | None:
        """A rank beyond the smaller side stores more than it can mean."""
        most = min(sizes.intermediate_size, len(self.projections) * sizes.hidden_size)
        return f"rank {self.rank} exceeds min(I, columns) = {most}" if self.rank > most else None
