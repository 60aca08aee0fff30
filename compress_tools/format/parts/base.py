"""What a part of a layer's coding answers for: its keys, its tensors, their meaning and their limits."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from compress_tools.format.dtypes import DTYPES, dtype_name
from compress_tools.format.finite import extremes
from compress_tools.format.packing import mask_row_counts, pack_codes, unpack_codes, unpack_mask
from compress_tools.format.quantization import dequantize, half_range
from compress_tools.format.row_sizes import code_row_bytes, num_groups

Projection = Literal["gate_proj", "up_proj", "down_proj"]
# The design matrix's column order. Two-matrix experts have no gate_proj.
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)

Bits = Literal[2, 3, 4, 8]
# Columns that share a scale; a row's last group may be shorter. None: the whole row.
GroupSize = Literal[32, 64, 128]

Rows = dict[Projection, Tensor]
# One expert's tensors, or those that a layer shares.
Key = tuple[Projection, str]
Stored = Mapping[Key, Tensor]
StoredTensors = dict[Key, Tensor]

# What a tensor holds: numbers in the model's dtype, packed codes, a trellis's packed symbols, scales, or a mask.
Role = Literal["values", "codes", "symbols", "scales", "mask"]
SCALE_DTYPE = "bfloat16"
# Ten million times it is still a number of 32 bits.
LARGEST = 2.0**96


class Frozen(BaseModel):
    """An object of the ``quantization_config`` block: unknown keys are refused, absent ones stay absent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_serializer(mode="wrap")
    def _without_absent_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


@dataclass(frozen=True)
class PartSizes:
    """What a part's tensors depend on beside its own keys.

    Attributes:
        intermediate_size: I.
        hidden_size: H.
        dtype: name of the dtype that values are stored in.
    """

    intermediate_size: int
    hidden_size: int
    dtype: str


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor of one layer.

    Attributes:
        expert: expert index, 0..E-1; None for what the whole layer shares.
        projection: the projection it is stored under; a tensor shared by a group is under the group's first.
        suffix: last component of its name.
        shape: stored shape.
        dtype: stored dtype's name.
        role: what it holds.
        codes: of rows of codes and of masks, the bits of one and the columns of a row.
        level: of scales, the largest level that they are multiplied with.
    """

    expert: int | None
    projection: Projection
    suffix: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    codes: tuple[int, int] | None = None
    level: float = 1.0

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def number_fault(self, tensor: Tensor, dtype: torch.dtype) -> str | None:
        """Numbers that are none, or too large for ``dtype`` or to be multiplied with, or scales below zero; or None.

        Whoever computes with a tensor asks this. Of two factors one may be as large as its dtype has numbers, and what
        they restore to small; but a token's product with the one is no number then.
        """
        least, most = extremes(tensor)
        if not isfinite(least) or not isfinite(most):
            return "holds NaN or Inf, expected finite numbers"
        if self.role == "scales" and least < 0:
            return f"holds a negative scale {least:.3g}, expected none below zero"
        largest = max(-least, most) * self.level
        what = "a scale of which codes make" if self.role == "scales" else "a value of"
        if largest > torch.finfo(dtype).max:
            return f"holds {what} {largest:.3g}, beyond {dtype_name(dtype)}"
        if largest > LARGEST:
            return f"holds {what} {largest:.3g}, expected at most {LARGEST:.3g}: sums of its products overflow"
        return None

    def padding_fault(self, tensor: Tensor) -> str | None:
        """Bits that the format forbids in what fills up a row of codes or of a mask; None where there is nothing."""
        if self.codes is None or self.role == "symbols":  # what fills up a row of symbols belongs to it
            return None
        bits, columns = self.codes
        if self.role == "mask":
            clean = bool(unpack_mask(tensor, columns).sum() == mask_row_counts(tensor).sum())
            return None if clean else f"padding bits after column {columns - 1} are set, expected zeros"
        clean = torch.equal(pack_codes(unpack_codes(tensor, bits, columns), bits), tensor)
        return None if clean else "padding codes are set"


@dataclass(frozen=True)
class CodedRows:
    """Rows stored as packed codes with scales, under two suffixes."""

    codes: str
    scales: str
    role: ClassVar[Role] = "codes"

    @property
    def roles(self) -> dict[str, Role]:
        """What each suffix holds."""
        return {self.codes: self.role, self.scales: "scales"}

    def largest_level(self, bits: int) -> float:
        """The largest magnitude that a scale is multiplied with."""
        return half_range(bits)

    def tensors(
        self, projection: Projection, rows: int, columns: int, bits: int, group_size: int | None = None
    ) -> Iterator[TensorSpec]:
        """Codes and scales of a matrix ``[rows, columns]``."""
        packed, coding = (rows, code_row_bytes(bits, columns)), (bits, columns)
        yield TensorSpec(None, projection, self.codes, packed, "uint8", self.role, coding)
        shape = rows, num_groups(columns, group_size)
        level = self.largest_level(bits)
        yield TensorSpec(None, projection, self.scales, shape, SCALE_DTYPE, "scales", level=level)

    def decode(
        self, stored: Stored, projection: Projection, columns: int, bits: int, group_size: int | None = None
    ) -> Tensor:
        """Levels times scales, fp32 ``[rows, columns]``."""
        return dequantize(stored[projection, self.codes], stored[projection, self.scales], bits, columns, group_size)


class Part(Frozen, ABC):
    """One part of a layer's coding. Everything that has to be known about a way of storing rows, it answers.

    A part of a center is stored once for the layer, a part of a residual once for each expert.

    Attributes:
        since: the first ``format_version`` that has it.
        keys_since: the keys that came later than the part itself, and when.
        roles: every suffix that it may store, and what that holds. Two parts with a suffix in common can't cover the
            same projection.
        kernel_coders: every name that ``kernel_coder`` may give.
        row_pointers: whether a loader must keep where each row's values begin: int32 ``[I]`` for each projection.
    """

    since: ClassVar[int]
    keys_since: ClassVar[Mapping[str, int]] = {}
    roles: ClassVar[Mapping[str, Role]]
    kernel_coders: ClassVar[tuple[str, ...]]
    row_pointers: ClassVar[bool] = False

    method: str
    projections: tuple[Projection, ...] = Field(min_length=1)

    @property
    def kernel_coder(self) -> str | None:
        """What a kernel has to be able to read, by name; None for what every kernel reads."""
        return self.kernel_coders[0] if self.kernel_coders else None

    @abstractmethod
    def tensors(self, sizes: PartSizes) -> Iterator[TensorSpec]:
        """What is stored, in the order of writing; of one expert or of the layer, which is left open."""

    @abstractmethod
    def params(self, sizes: PartSizes) -> int:
        """Stored parameters: values, factors and codes; masks and scales are none."""

    @abstractmethod
    def decode(self, stored: Stored, hidden_size: int, dtype: torch.dtype = torch.float32) -> Rows:
        """What is stored, as rows ``[I, H]`` for each projection; arithmetic in fp32, the result in ``dtype``.

        Raises:
            FormatError: the tensors contradict each other.
        """

    @abstractmethod
    def describe(self) -> str:
        """For people, in a few words."""

    def size_fault(self, sizes: PartSizes) -> str | None:
        """Which of its keys can't be at these sizes; None where all can."""
        del sizes
        return None

    def stored_fault(self, stored: Stored) -> str | None:
        """How its tensors contradict each other or its keys; each by itself is ``TensorSpec``'s to check."""
        del stored
        return None

    def example_masks(self, sizes: PartSizes) -> StoredTensors:
        """Masks that fit its counts, bits evenly spread; all other tensors may hold anything."""
        del sizes
        return {}

    def newer_than(self, version: int) -> tuple[str, int] | None:
        """The method, or the first key, that a ``format_version`` doesn't have, and the first that does."""
        if self.since > version:
            return self.method, self.since
        newer = {key: self.keys_since[key] for key in self.model_fields_set if self.keys_since.get(key, 0) > version}
        return min(newer.items(), default=None)

    def row_pointer_bytes(self, sizes: PartSizes) -> int:
        """Bytes that a loader adds in memory for each expert."""
        return 4 * len(self.projections) * sizes.intermediate_size if self.row_pointers else 0

    def words(self, *words: str) -> str:
        """``method (word, word, joint)``, the last for the projections that it covers together."""
        covered = "joint" if len(self.projections) > 1 else self.projections[0]
        return f"{self.method} ({', '.join([*words, covered])})"


def describe_codes(bits: int, group_size: int | None) -> str:
    """``4-bit by 128``."""
    return f"{bits}-bit" if group_size is None else f"{bits}-bit by {group_size}"
