"""Checkpoint tensors -> stacked parameters of one layer on one rank, every tensor checked and counted.

vLLM drops unmatched names under ``experts.`` in silence and doesn't check completeness of quantised models,
so both are done here. Tensor parallelism slices rows (the intermediate dimension); expert parallelism keeps
local experts.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from compress_tools.errors import FormatError
from compress_tools.format.packing import mask_row_counts, pack_mask
from compress_tools.format.schema import BitmapResidual, Projection, ResMoEFormat
from compress_tools.format.tensors import (
    CENTER_EXPERT,
    DTYPES,
    MASK,
    VALUES,
    TensorSpec,
    expert_tensors,
    shared_tensors,
    tensor_name,
)
from resmoe_vllm.layout import (
    PROJECTION_OF_SHARD,
    ROW_PTR,
    STARTS,
    Key,
    layout_key,
    parse_layout,
)

Place = tuple[Projection, str, int]


class LayerLoader:
    """Creates the parameters of one compressed layer and fills them.

    Args:
        fmt: the checkpoint's format block.
        index: decoder layer index.
        num_local_experts: experts on this rank.
        local_expert: global expert index -> local one, -1 when another rank's.
        tp_size: ranks that share the rows of every expert.
        tp_rank: this rank's place among them.
    """

    def __init__(
        self,
        fmt: ResMoEFormat,
        index: int,
        num_local_experts: int,
        local_expert: Callable[[int], int],
        tp_size: int = 1,
        tp_rank: int = 0,
    ) -> None:
        self.fmt = fmt
        self.index = index
        self.num_local_experts = num_local_experts
        self.local_expert = local_expert
        self.rows_from = fmt.intermediate_size // tp_size * tp_rank
        self.layout = parse_layout(layout_key(fmt, index, tp_size))
        layer = fmt.layers[index]
        self.stored: dict[Key, TensorSpec] = {
            (spec.projection, spec.suffix): spec
            for spec in (*shared_tensors(fmt, layer), *expert_tensors(fmt, layer, 0))
        }
        # how many tensors this rank loads
        self.num_places = sum(1 if spec.expert is None else num_local_experts for spec in self.stored.values())
        self.bitmaps: dict[Projection, BitmapResidual] = {
            projection: part for part in layer.residual if part.method == "bitmap" for projection in part.projections
        }
        self.params: dict[str, torch.nn.Parameter] = {}
        self.loaded: set[Place] = set()
        self.row_counts: dict[tuple[Projection, int], Tensor] = {}  # int64 [I], whole rows of all ranks
        self.staged_values: dict[tuple[Projection, int], Tensor] = {}  # only when values are packed

    def create_params(self, layer: torch.nn.Module, dtype: torch.dtype) -> None:
        """Register the layer's parameters on the default device; ``dtype`` is the model's."""
        for name, (columns, stored_dtype, shared) in self.layout.params.items():
            rows = 1 if shared else self.num_local_experts
            kind = dtype if stored_dtype == self.fmt.dtype else getattr(torch, stored_dtype)
            param = torch.nn.Parameter(torch.empty(rows, columns, dtype=kind), requires_grad=False)
            param.weight_loader = partial(self.load, name)
            layer.register_parameter(name, param)
            self.params[name] = param

    def load(
        self,
        name: str,
        param: torch.nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str = "",
        shard_id: str = "",
        expert_id: int = CENTER_EXPERT,
        return_success: bool = False,
    ) -> bool | None:
        """vLLM's weight loader of the parameter ``name``: check one tensor and put this rank's part in place.

        Args:
            name: parameter name, bound by ``create_params``.
            param: the parameter.
            loaded_weight: the stored tensor.
            weight_name: vLLM's name of it; only for messages.
            shard_id: "w1" gate, "w3" up, "w2" down.
            expert_id: global expert index.
            return_success: vLLM asks whether the tensor was this rank's.
        Returns:
            whether it was, or None when not asked.
        Raises:
            FormatError: not a tensor of this layer, loaded before, or of a wrong shape or dtype.
        """
        if shard_id not in PROJECTION_OF_SHARD:
            raise FormatError(f"{weight_name or name}: this model's loader doesn't say which expert tensor it loads")
        projection, suffix = PROJECTION_OF_SHARD[shard_id], name.split("_", 1)[1]
        spec = self.stored.get((projection, suffix))
        if spec is None or (spec.expert is None and expert_id != CENTER_EXPERT):
            stored_name = tensor_name(self.fmt, self.index, expert_id, projection, suffix)
            raise FormatError(f"{stored_name}: quantization_config has no such tensor in layer {self.index}")
        row = 0 if spec.expert is None else self.local_expert(expert_id)
        if row >= 0:
            self._put(spec, row, expert_id, loaded_weight)
        return row >= 0 if return_success else None

    def _put(self, spec: TensorSpec, row: int, expert_id: int, tensor: Tensor) -> None:
        projection, suffix = spec.projection, spec.suffix
        stored_name = tensor_name(self.fmt, self.index, expert_id, projection, suffix)
        if (projection, suffix, row) in self.loaded:
            raise FormatError(f"{stored_name}: stored twice")
        if tuple(tensor.shape) != spec.shape or tensor.dtype != DTYPES[spec.dtype]:
            raise FormatError(
                f"{stored_name}: expected {list(spec.shape)} {spec.dtype}, "
                f"found {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            )
        if suffix == MASK:
            self._count_rows(stored_name, (projection, row), tensor)
        if suffix == VALUES and self.layout.packed:
            # cloned: the loader may reuse its buffer
            self.staged_values[projection, row] = tensor.clone()
        else:
            slot = self.layout.slots[projection, suffix]
            if slot.shape != spec.shape:
                tensor = tensor.narrow(0, self.rows_from, slot.shape[0])
            slot.view(self.params[slot.param].data)[row].copy_(tensor)
        self.loaded.add((projection, suffix, row))
        if suffix in (MASK, VALUES):
            self._finish_group(self.bitmaps[projection], row, expert_id)
        if self.layout.packed and len(self.loaded) == self.num_places:
            self._pack_values()

    def _count_rows(self, stored_name: str, place: tuple[Projection, int], mask: Tensor) -> None:
        hidden_size = self.fmt.hidden_size
        tail = mask[:, hidden_size // 8 :].clone()
        if tail.numel() and hidden_size % 8:
            tail[:, 0] >>= hidden_size % 8
        if tail.any():
            raise FormatError(f"{stored_name}: padding bits after column {hidden_size - 1} are set, expected zeros")
        self.row_counts[place] = mask_row_counts(mask).cpu()

    def _finish_group(self, part: BitmapResidual, row: int, expert_id: int) -> None:
        """Once an expert's bitmap group is whole: check the count, write row pointers, slice values."""
        first = part.projections[0]
        places = [(first, VALUES, row), *((projection, MASK, row) for projection in part.projections)]
        if not self.loaded.issuperset(places):
            return
        counts = torch.stack([self.row_counts.pop((projection, row)) for projection in part.projections])
        if int(counts.sum()) != part.values_per_expert:
            stored_name = tensor_name(self.fmt, self.index, expert_id, first, VALUES)
            raise FormatError(
                f"{stored_name}: masks keep {int(counts.sum())} values, {part.values_per_expert} are stored"
            )
        ends = counts.flatten().cumsum(0).view_as(counts)
        local = slice(self.rows_from, self.rows_from + self.layout.slots[first, ROW_PTR].shape[0])
        if self.layout.packed:
            values = self.staged_values[first, row]
            kept = [
                values[int(e[0] - c[0]) : int(e[-1])] for e, c in zip(ends[:, local], counts[:, local], strict=True)
            ]
            self.staged_values[first, row] = torch.cat(kept)
            counts = counts[:, local]
            ends = counts.flatten().cumsum(0).view_as(counts)
        for projection, row_ptr in zip(part.projections, ends - counts, strict=True):
            slot = self.layout.slots[projection, ROW_PTR]
            slot.view(self.params[slot.param].data)[row].copy_(row_ptr)

    def _pack_values(self) -> None:
        """All values of the layer are there and sliced: put them into one flat tensor per parameter."""
        groups = [projection for projection, suffix in self.stored if suffix == VALUES]
        for name in {self.layout.slots[projection, VALUES].param for projection in groups}:
            pieces, end = [], 0
            for projection in (group for group in groups if self.layout.slots[group, VALUES].param == name):
                slot = self.layout.slots[projection, STARTS]
                starts = slot.view(self.params[slot.param].data)
                for row in range(self.num_local_experts):
                    pieces.append(self.staged_values.pop((projection, row)))
                    starts[row] = end
                    end += pieces[-1].numel()
            param = self.params[name]
            param.data = torch.cat(pieces).to(param.dtype).to(param.device)

    def check_complete(self) -> None:
        """Called after loading.

        Raises:
            FormatError: tensors are missing; names the first.
        """
        missing = list(self._missing())
        if missing:
            raise FormatError(
                f"layer {self.index}: {len(missing)} of {self.num_places} tensors are missing, "
                f"first {missing[0]}; the checkpoint is incomplete, download or compress it again"
            )

    def _missing(self) -> Iterator[str]:
        for expert_id in range(self.fmt.num_experts):
            row = self.local_expert(expert_id)
            for (projection, suffix), spec in self.stored.items():
                shared = spec.expert is None
                wanted = expert_id == CENTER_EXPERT if shared else row >= 0
                if wanted and (projection, suffix, 0 if shared else row) not in self.loaded:
                    yield tensor_name(self.fmt, self.index, expert_id, projection, suffix)

    def load_dummies(self) -> None:
        """Load small random values and evenly spread masks, as if stored (``--load-format dummy``)."""
        generator = torch.Generator(device="cpu").manual_seed(0)
        tensors = {
            key: torch.rand(spec.shape, generator=generator, dtype=torch.float32, device="cpu")
            .mul_(2e-3)
            .sub_(1e-3)
            .to(DTYPES[spec.dtype])
            for key, spec in self.stored.items()
            if spec.suffix != MASK
        }
        for part in self.fmt.layers[self.index].residual:
            if part.method == "bitmap":
                for projection, keep in zip(part.projections, self._dummy_keep(part), strict=True):
                    tensors[projection, MASK] = pack_mask(keep)
        for expert_id in range(self.fmt.num_experts):
            for (projection, suffix), spec in self.stored.items():
                row = 0 if spec.expert is None else self.local_expert(expert_id)
                if row >= 0 and (spec.expert is not None or expert_id == CENTER_EXPERT):
                    self._put(spec, row, expert_id, tensors[projection, suffix])

    def _dummy_keep(self, part: BitmapResidual) -> Tensor:
        """``values_per_expert`` entries, evenly spread: bool ``[P, I, H]``."""
        shape = (len(part.projections), self.fmt.intermediate_size, self.fmt.hidden_size)
        keep = torch.zeros(shape, dtype=torch.bool, device="cpu")
        kept = torch.arange(part.values_per_expert, device="cpu") * keep.numel() // part.values_per_expert
        keep.view(-1)[kept] = True
        return keep
