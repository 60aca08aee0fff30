"""Parameters of one group of experts, coded alike, on one rank: each tensor checked, sliced and put in its row."""

from collections.abc import Iterator

import torch
from torch import Tensor

from compress_tools.errors import FormatError, NumericalError
from compress_tools.format.dtypes import DTYPES, dtype_name
from compress_tools.format.packing import mask_row_counts, pack_codes, unpack_codes
from compress_tools.format.parts.base import TensorSpec
from compress_tools.format.parts.bitmap import MASK
from compress_tools.format.schema import BitmapResidual, LayerSpec, Projection, ResMoEFormat, RowBitmapResidual
from compress_tools.format.tensors import BIAS, CENTER_EXPERT, expert_tensors, shared_tensors, tensor_name
from resmoe_vllm.weights.layout import ROW_PTR, STARTS, STREAMS, Key, make_layout

Place = tuple[Projection, str, int]


class GroupLoader:
    """Fills the parameters of one group; all of a layer's experts are one group, unless its spec has several.

    Args:
        fmt: the checkpoint's format block.
        index: decoder layer index.
        spec: the layer as this group is stored: ``LayerSpec.of_group``.
        experts: the group's global experts, those of other ranks too.
        rows: global expert -> row of the parameters, for the group's experts on this rank.
        owns_shared: this group's loader fills what the whole layer shares, too.
        tp_size: ranks that share the rows of every expert.
        tp_rank: this rank's place among them.
        padded: see ``LayerLayout``.
    """

    def __init__(  # noqa: PLR0913  the group, and this rank's place
        self,
        fmt: ResMoEFormat,
        index: int,
        spec: LayerSpec,
        experts: tuple[int, ...],
        rows: dict[int, int],
        *,
        owns_shared: bool,
        tp_size: int,
        tp_rank: int,
        padded: bool = False,
    ) -> None:
        self.fmt, self.index, self.spec, self.experts, self.rows = fmt, index, spec, experts, rows
        self.owns_shared = owns_shared
        self.tp_rank = tp_rank
        self.rows_from = fmt.intermediate_size // tp_size * tp_rank
        self.layout = make_layout(fmt, spec, tp_size, padded=padded)
        self.stored: dict[Key, TensorSpec] = {
            (tensor.projection, tensor.suffix): tensor
            for tensor in (*shared_tensors(fmt, spec), *expert_tensors(fmt, spec, experts[0]))
        }
        # how many tensors this rank loads
        self.num_places = sum(1 if tensor.expert is None else len(rows) for tensor in self.own_specs())
        self.bitmaps: dict[Projection, BitmapResidual] = {
            projection: part
            for part in spec.residual
            if isinstance(part, BitmapResidual)
            for projection in part.projections
        }
        self.row_counts_expected: dict[Projection, int] = {
            projection: part.values_per_row
            for part in spec.residual
            if isinstance(part, RowBitmapResidual)
            for projection in part.projections
        }
        self.params: dict[str, torch.nn.Parameter] = {}
        self.loaded: set[Place] = set()
        self.row_counts: dict[tuple[Projection, int], Tensor] = {}  # int64 [I], whole rows of all ranks
        self.staged_values: dict[tuple[Projection, int], Tensor] = {}  # only when values are packed

    def own_specs(self) -> Iterator[TensorSpec]:
        """Tensors that this loader fills."""
        return (spec for spec in self.stored.values() if spec.expert is not None or self.owns_shared)

    def put(self, spec: TensorSpec, row: int, expert_id: int, tensor: Tensor) -> None:
        """Check one stored tensor and put this rank's part in its row.

        Raises:
            FormatError: loaded before, of a wrong shape or dtype, or masks that don't fit; names the tensor.
            NumericalError: it holds NaN or Inf, or means such.
        """
        projection, suffix = spec.projection, spec.suffix
        stored_name = tensor_name(self.fmt, self.index, expert_id, projection, suffix)
        if (projection, suffix, row) in self.loaded:
            raise FormatError(f"{stored_name}: stored twice")
        if tuple(tensor.shape) != spec.shape or tensor.dtype != DTYPES[spec.dtype]:
            raise FormatError(
                f"{stored_name}: expected {list(spec.shape)} {spec.dtype}, "
                f"found {list(tensor.shape)} {dtype_name(tensor.dtype)}"
            )
        if suffix == MASK:
            self._check_mask(stored_name, projection, row, tensor)
        if suffix in STREAMS and self.layout.packed:
            self._check_numbers(stored_name, spec, tensor.to(self.params[self.layout.slots[projection, suffix].param]))
            # cloned: the loader may reuse its buffer
            self.staged_values[projection, row] = tensor.clone()
        else:
            slot = self.layout.slots[projection, suffix]
            if slot.shape != spec.shape:
                tensor = tensor.narrow(0, self.rows_from, slot.shape[0])
            elif suffix == BIAS and self.tp_rank > 0:
                # down's, whose rows no rank slices: the sum over ranks has it once
                tensor = torch.zeros_like(tensor)
            held = slot.put(self.params[slot.param].data, row, tensor)
            self._check_numbers(stored_name, spec, held)
        self.loaded.add((projection, suffix, row))
        if suffix in STREAMS or (suffix == MASK and projection in self.bitmaps):
            self._finish_bitmap(self.bitmaps[projection], row, expert_id)
        if self.layout.packed and len(self.loaded) == self.num_places:
            self._pack_values()

    def missing(self) -> Iterator[str]:
        """Names of tensors that this rank needs and didn't get."""
        for spec in self.own_specs():
            if spec.expert is None and (spec.projection, spec.suffix, 0) not in self.loaded:
                yield tensor_name(self.fmt, self.index, CENTER_EXPERT, spec.projection, spec.suffix)
        for expert, row in self.rows.items():
            for spec in self.own_specs():
                if spec.expert is not None and (spec.projection, spec.suffix, row) not in self.loaded:
                    yield tensor_name(self.fmt, self.index, expert, spec.projection, spec.suffix)

    def _check_numbers(self, stored_name: str, spec: TensorSpec, held: Tensor) -> None:
        """Of what is held, in the model's dtype: a product with NaN would reach every token."""
        if fault := spec.number_fault(held, DTYPES[self.fmt.dtype]):
            raise NumericalError(
                f"{stored_name}: {fault} (as {dtype_name(held.dtype)}); the checkpoint is damaged, download or "
                "compress it again"
            )

    def _check_mask(self, stored_name: str, projection: Projection, row: int, mask: Tensor) -> None:
        hidden_size = self.fmt.hidden_size
        tail = mask[:, hidden_size // 8 :].clone()
        if tail.numel() and hidden_size % 8:
            tail[:, 0] >>= hidden_size % 8
        if tail.any():
            raise FormatError(f"{stored_name}: padding bits after column {hidden_size - 1} are set, expected zeros")
        counts = mask_row_counts(mask).cpu()
        if projection in self.bitmaps:
            self.row_counts[projection, row] = counts
        elif (wrong := counts[counts != self.row_counts_expected[projection]]).numel():
            raise FormatError(
                f"{stored_name}: a row keeps {int(wrong[0])} values, "
                f"expected {self.row_counts_expected[projection]} in every row"
            )

    def _finish_bitmap(self, part: BitmapResidual, row: int, expert_id: int) -> None:
        """Once an expert's bitmap is whole: check the count, write row pointers, slice values."""
        first = part.projections[0]
        stream = part.stream
        places = [(first, stream, row), *((projection, MASK, row) for projection in part.projections)]
        if not self.loaded.issuperset(places):
            return
        counts = torch.stack([self.row_counts.pop((projection, row)) for projection in part.projections])
        if int(counts.sum()) != part.values_per_expert:
            stored_name = tensor_name(self.fmt, self.index, expert_id, first, stream)
            raise FormatError(
                f"{stored_name}: masks keep {int(counts.sum())} values, {part.values_per_expert} are stored"
            )
        ends = counts.flatten().cumsum(0).view_as(counts)
        local = slice(self.rows_from, self.rows_from + self.layout.slots[first, ROW_PTR].shape[0])
        if self.layout.packed:
            values = self.staged_values[first, row]
            if part.value_bits is not None:
                values = unpack_codes(values, part.value_bits, part.values_per_expert)
            kept = torch.cat(
                [values[int(e[0] - c[0]) : int(e[-1])] for e, c in zip(ends[:, local], counts[:, local], strict=True)]
            )
            self.staged_values[first, row] = kept if part.value_bits is None else pack_codes(kept, part.value_bits)
            counts = counts[:, local]
            ends = counts.flatten().cumsum(0).view_as(counts)
        for projection, row_ptr in zip(part.projections, ends - counts, strict=True):
            slot = self.layout.slots[projection, ROW_PTR]
            slot.view(self.params[slot.param].data)[row].copy_(row_ptr)

    def _pack_values(self) -> None:
        """All values of the group are there and sliced: put them into one flat tensor per parameter."""
        streams = [key for key in self.stored if key[1] in STREAMS]
        for name in {self.layout.slots[key].param for key in streams}:
            pieces, end = [], 0
            for projection, _ in (key for key in streams if self.layout.slots[key].param == name):
                slot = self.layout.slots[projection, STARTS]
                starts = slot.view(self.params[slot.param].data)
                for row in range(len(self.rows)):
                    pieces.append(self.staged_values.pop((projection, row)))
                    starts[row] = end
                    end += pieces[-1].numel()
            param = self.params[name]
            param.data = torch.cat(pieces).to(param.dtype).to(param.device)
