"""A pruned residual: one bit per weight, then the kept values, in the model's dtype or as codes.

``encode_bitmap`` and ``encode_row_bitmap`` are here because a bitmap's order of values is the format's.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal, Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from compress_tools.errors import FormatError
from compress_tools.format.packing import mask_row_counts, pack_mask, unpack_mask
from compress_tools.format.parts.base import (
    SCALE_DTYPE,
    Frozen,
    GroupSize,
    Part,
    PartSizes,
    Projection,
    Rows,
    Stored,
    StoredTensors,
    TensorSpec,
    describe_codes,
)
from compress_tools.format.quantization import decode_levels, expand_scales, half_range
from compress_tools.format.row_sizes import code_row_bytes, mask_row_bytes, num_groups

MASK = "resmoe_mask"
VALUES = "resmoe_values"
VALUE_CODES = "resmoe_value_codes"
ROW_VALUES = "resmoe_row_values"
ROW_VALUE_CODES = "resmoe_row_value_codes"
VALUE_SCALES = "resmoe_value_scales"

ValueBits = Literal[4, 8]


class _ValueKeys(Frozen):
    """``value_bits``: kept values as codes and scales instead of the checkpoint's dtype."""

    value_bits: ValueBits | None = None
    group_size: GroupSize | None = None

    @model_validator(mode="after")
    def _groups_need_codes(self) -> Self:
        if self.group_size is not None and self.value_bits is None:
            raise ValueError("group_size without value_bits")
        return self


class _Bitmap(Part, _ValueKeys, ABC):
    @property
    def kernel_coder(self) -> str:
        """Values in codes are a coder of their own."""
        plain, coded = self.kernel_coders
        return plain if self.value_bits is None else coded

    def tensors(self, sizes: PartSizes) -> Iterator[TensorSpec]:
        """Masks, the scales of codes, then the values."""
        size_i, size_h = sizes.intermediate_size, sizes.hidden_size
        for projection in self.projections:
            yield TensorSpec(None, projection, MASK, (size_i, mask_row_bytes(size_h)), "uint8", "mask", (1, size_h))
        if self.value_bits is not None:
            shape = size_i, num_groups(size_h, self.group_size)
            for projection in self.projections:
                level = half_range(self.value_bits)
                yield TensorSpec(None, projection, VALUE_SCALES, shape, SCALE_DTYPE, "scales", level=level)
        yield from self._values(sizes)

    @abstractmethod
    def _values(self, sizes: PartSizes) -> Iterator[TensorSpec]:
        """The tensors of kept values."""

    @abstractmethod
    def _count(self) -> str:
        """How many values are kept, for people."""

    def describe(self) -> str:
        """See ``Part.describe``."""
        coded = [] if self.value_bits is None else [describe_codes(self.value_bits, self.group_size)]
        return self.words(self._count(), *coded)

    def _scattered(self, keep: Tensor, values: Tensor, stored: Stored, projection: Projection) -> Tensor:
        """Kept values, or levels times the scales of their columns, where their bits are set: fp32 ``[I, H]``."""
        dense = torch.zeros(keep.shape, device=keep.device).masked_scatter_(keep, values)
        if self.value_bits is None:
            return dense
        return dense * expand_scales(stored[projection, VALUE_SCALES], dense.shape[-1], self.group_size)


class BitmapResidual(_Bitmap):
    """As many kept values in every expert, wherever they lie in the group: rows differ in their counts."""

    since: ClassVar = 1
    keys_since: ClassVar = {"value_bits": 2, "group_size": 2}
    roles: ClassVar = {MASK: "mask", VALUES: "values", VALUE_CODES: "codes", VALUE_SCALES: "scales"}
    kernel_coders: ClassVar = ("bitmap", "bitmap_codes")
    row_pointers: ClassVar = True

    method: Literal["bitmap"] = "bitmap"
    values_per_expert: PositiveInt

    @property
    def stream(self) -> str:
        """Suffix of the one run of values that the whole group has, stored under its first projection."""
        return VALUES if self.value_bits is None else VALUE_CODES

    def _values(self, sizes: PartSizes) -> Iterator[TensorSpec]:
        first, count = self.projections[0], self.values_per_expert
        if self.value_bits is None:
            yield TensorSpec(None, first, VALUES, (count,), sizes.dtype, "values")
        else:
            shape, coding = (code_row_bytes(self.value_bits, count),), (self.value_bits, count)
            yield TensorSpec(None, first, VALUE_CODES, shape, "uint8", "codes", coding)

    def params(self, sizes: PartSizes) -> int:
        """Kept values."""
        del sizes
        return self.values_per_expert

    def decode(self, stored: Stored, hidden_size: int, dtype: torch.dtype = torch.float32) -> Rows:
        """Kept values where their bits are set; zero elsewhere."""
        keep = {projection: unpack_mask(stored[projection, MASK], hidden_size) for projection in self.projections}
        counts = [int(mask.count_nonzero()) for mask in keep.values()]
        if sum(counts) != self.values_per_expert:
            raise FormatError(f"masks keep {sum(counts)} values, {self.values_per_expert} are stored")
        own = stored[self.projections[0], self.stream]
        values = own.float() if self.value_bits is None else decode_levels(own, self.value_bits, sum(counts))
        return {
            projection: self._scattered(keep[projection], part, stored, projection).to(dtype)
            for projection, part in zip(self.projections, torch.split(values, counts), strict=True)
        }

    def size_fault(self, sizes: PartSizes) -> str | None:
        """No more values than weights."""
        weights = len(self.projections) * sizes.intermediate_size * sizes.hidden_size
        if self.values_per_expert <= weights:
            return None
        return f"values_per_expert {self.values_per_expert} exceeds the {weights} weights it is drawn from"

    def stored_fault(self, stored: Stored) -> str | None:
        """As many bits over the group as values."""
        kept = sum(int(mask_row_counts(stored[projection, MASK]).sum()) for projection in self.projections)
        if kept == self.values_per_expert:
            return None
        return f"masks keep {kept} values, the config says {self.values_per_expert}"

    def example_masks(self, sizes: PartSizes) -> StoredTensors:
        """See ``Part.example_masks``."""
        shape = len(self.projections), sizes.intermediate_size, sizes.hidden_size
        keep = torch.zeros(shape, dtype=torch.bool, device="cpu")
        count = self.values_per_expert
        keep.view(-1)[torch.arange(count, device="cpu") * keep.numel() // count] = True
        return {(projection, MASK): pack_mask(own) for projection, own in zip(self.projections, keep, strict=True)}

    def _count(self) -> str:
        return f"{self.values_per_expert} values"


class RowBitmapResidual(_Bitmap):
    """Equally many kept values in every row of every projection: fixed strides."""

    since: ClassVar = 2
    roles: ClassVar = {MASK: "mask", ROW_VALUES: "values", ROW_VALUE_CODES: "codes", VALUE_SCALES: "scales"}
    kernel_coders: ClassVar = ("bitmap_rows", "bitmap_rows_codes")

    method: Literal["bitmap_rows"] = "bitmap_rows"
    values_per_row: PositiveInt

    def _values(self, sizes: PartSizes) -> Iterator[TensorSpec]:
        size_i, count = sizes.intermediate_size, self.values_per_row
        for projection in self.projections:
            if self.value_bits is None:
                yield TensorSpec(None, projection, ROW_VALUES, (size_i, count), sizes.dtype, "values")
            else:
                shape, coding = (size_i, code_row_bytes(self.value_bits, count)), (self.value_bits, count)
                yield TensorSpec(None, projection, ROW_VALUE_CODES, shape, "uint8", "codes", coding)

    def params(self, sizes: PartSizes) -> int:
        """Kept values."""
        return len(self.projections) * sizes.intermediate_size * self.values_per_row

    def decode(self, stored: Stored, hidden_size: int, dtype: torch.dtype = torch.float32) -> Rows:
        """As ``BitmapResidual.decode``; every row has its own values."""
        rows: Rows = {}
        for projection in self.projections:
            mask = stored[projection, MASK]
            wrong = self.wrong_count(mask)
            if wrong is not None:
                raise FormatError(f"{projection}: a row's mask keeps {wrong} values, {self.values_per_row} are stored")
            if self.value_bits is None:
                values = stored[projection, ROW_VALUES].float()
            else:
                values = decode_levels(stored[projection, ROW_VALUE_CODES], self.value_bits, self.values_per_row)
            rows[projection] = self._scattered(unpack_mask(mask, hidden_size), values, stored, projection).to(dtype)
        return rows

    def wrong_count(self, mask: Tensor) -> int | None:
        """Bits of the first row of a mask that keeps more or fewer values than the rows have; None without one."""
        counts = mask_row_counts(mask)
        wrong = counts[counts != self.values_per_row]
        return int(wrong[0]) if wrong.numel() else None

    def size_fault(self, sizes: PartSizes) -> str | None:
        """No more values than columns."""
        if self.values_per_row <= sizes.hidden_size:
            return None
        return f"values_per_row {self.values_per_row} exceeds H = {sizes.hidden_size}"

    def stored_fault(self, stored: Stored) -> str | None:
        """As many bits in every row as values."""
        for projection in self.projections:
            wrong = self.wrong_count(stored[projection, MASK])
            if wrong is not None:
                return f"a row keeps {wrong} values, the config says {self.values_per_row}"
        return None

    def example_masks(self, sizes: PartSizes) -> StoredTensors:
        """See ``Part.example_masks``."""
        keep = torch.zeros(sizes.intermediate_size, sizes.hidden_size, dtype=torch.bool, device="cpu")
        columns = torch.arange(self.values_per_row, device="cpu") * sizes.hidden_size // self.values_per_row
        keep[:, columns] = True
        return {(projection, MASK): pack_mask(keep) for projection in self.projections}

    def _count(self) -> str:
        return f"{self.values_per_row} values in every row"


def encode_bitmap(rows: Rows, keep: Rows, dtype: torch.dtype) -> StoredTensors:
    """Store kept entries as masks and one value stream: projections in order, row by row, column by column."""
    projections = tuple(rows)
    stored: StoredTensors = {(projection, MASK): pack_mask(keep[projection]) for projection in projections}
    values = torch.cat([rows[projection][keep[projection]] for projection in projections])
    return {**stored, (projections[0], VALUES): values.to(dtype)}


def encode_row_bitmap(rows: Rows, keep: Rows, dtype: torch.dtype) -> StoredTensors:
    """Store kept entries, equally many in every row, as masks and values ``[I, N]`` for each projection."""
    stored: StoredTensors = {(projection, MASK): pack_mask(mask) for projection, mask in keep.items()}
    for projection, mask in keep.items():
        stored[projection, ROW_VALUES] = rows[projection][mask].view(len(mask), -1).to(dtype)
    return stored
