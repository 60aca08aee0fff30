"""A ResMoE checkpoint opened for reading: validated, and its experts by layer and index."""

from collections.abc import Iterable, Mapping
from copy import copy
from math import prod
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from compress_tools.errors import FormatError, NumericalError
from compress_tools.format.codec import restore_expert
from compress_tools.format.directory import check_headers
from compress_tools.format.dtypes import DTYPES
from compress_tools.format.parts.base import Rows, StoredTensors, TensorSpec
from compress_tools.format.rest import decode_rows, row_names, rows_fault
from compress_tools.format.schema import Projection, parse_format
from compress_tools.format.tensors import (
    BIAS,
    expert_tensors,
    is_resmoe_name,
    layer_tensors,
    shared_tensors,
    tensor_name,
)
from compress_tools.source.reader import CheckpointReader


class ResMoECheckpoint:
    """A ResMoE checkpoint directory.

    Args:
        path: the directory.
    Raises:
        CheckpointError: not a readable checkpoint.
        FormatError: not ResMoE, or names, shapes or dtypes disagree with the config.
    """

    def __init__(self, path: str | Path) -> None:
        self.reader = CheckpointReader(path)
        block = self.reader.config.get("quantization_config")
        if block is None:
            raise FormatError(f"{self.reader.path}: config.json has no quantization_config; not a ResMoE checkpoint")
        self.fmt = parse_format(block, str(self.reader.path / "config.json"))
        self._given: Mapping[str, Tensor] = {}
        self._last_shared: tuple[int, StoredTensors] | None = None
        check_headers(self.fmt, self.reader.headers, str(self.reader.path))

    def with_tensors(self, given: Mapping[str, Tensor]) -> Self:
        """The same checkpoint with some tensors given by name, which are then not read from their files."""
        made = copy(self)
        made._given, made._last_shared = given, None
        return made

    def with_layer(self, layer: int) -> Self:
        """The same checkpoint with one layer read, once, and checked.

        Raises:
            CheckpointError: not readable.
            NumericalError, FormatError: see ``check_values``.
        """
        made = self.with_tensors({name: self.reader.get(name) for name in layer_tensors(self.fmt, layer)})
        made.check_values(layer)
        return made

    @property
    def plain_names(self) -> list[str]:
        """Names of all tensors that are no experts', those in codes as they are called where they are not; sorted."""
        kept = [name for name in self.reader.names if not is_resmoe_name(name)]
        return sorted([*kept, *self.fmt.rest_tensors])

    def plain_bytes(self, name: str) -> int:
        """Bytes of a tensor of ``plain_names``, decoded."""
        if name not in self.fmt.rest_tensors:
            return self.reader.nbytes(name)
        return prod(self.reader.shape(row_names(name)[0])) * self.dtype.itemsize

    def plain(self, name: str) -> Tensor:
        """A tensor of ``plain_names``, decoded.

        Raises:
            CheckpointError: not readable.
            FormatError: see ``check_rows``.
        """
        if name not in self.fmt.rest_tensors:
            return self.reader.get(name)
        return decode_rows(*self.check_rows(name), self.dtype)

    def check_rows(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes and scales of a matrix of ``fmt.rest_tensors``.

        Raises:
            FormatError: they hold what the format forbids.
        """
        codes, scales = map(self._tensor, row_names(name))
        if fault := rows_fault(codes, scales, self.dtype):
            raise FormatError(f"{self.reader.path}: {name!r} in codes {fault}")
        return codes, scales

    def expert(self, layer: int, expert: int) -> Rows:
        """One restored expert, fp32 ``[I, H]`` rows for each projection."""
        return restore_expert(
            self.fmt.layers[layer].of_expert(expert),
            self.shared(layer),
            self.stored(layer, expert),
            self.fmt.hidden_size,
        )

    def biases(self, layer: int, expert: int) -> dict[Projection, Tensor] | None:
        """One expert's biases by projection, in the row order of the restored expert; None without biases."""
        if not self.fmt.biases:
            return None
        stored = self.stored(layer, expert)
        return {projection: tensor for (projection, suffix), tensor in stored.items() if suffix == BIAS}

    def shared(self, layer: int) -> StoredTensors:
        """A layer's shared tensors by (projection, suffix); kept for the last layer, as every expert needs them."""
        if self._last_shared is None or self._last_shared[0] != layer:
            self._last_shared = layer, self._read(layer, shared_tensors(self.fmt, self.fmt.layers[layer]))
        return self._last_shared[1]

    def stored(self, layer: int, expert: int) -> StoredTensors:
        """One expert's stored tensors by (projection, suffix)."""
        return self._read(layer, expert_tensors(self.fmt, self.fmt.layers[layer], expert))

    def check_values(self, layer: int) -> None:
        """Read a whole layer: finite everywhere, masks with as many bits as values, clean padding.

        Raises:
            NumericalError: NaN, Inf, scales whose weights are, or that are negative; names the tensor.
            FormatError: a mask disagrees with the config.
        """
        for name, spec in layer_tensors(self.fmt, layer).items():
            tensor = self._tensor(name)
            if fault := spec.number_fault(tensor, self.dtype):
                raise NumericalError(f"{self.reader.path}: {name!r} {fault}")
            if fault := spec.padding_fault(tensor):
                raise FormatError(f"{self.reader.path}: {name!r}: {fault}")
        for expert in range(self.fmt.num_experts):
            stored = self.stored(layer, expert)
            for part in self.fmt.layers[layer].of_expert(expert).residual:
                if fault := part.stored_fault(stored):
                    raise FormatError(f"{self.reader.path}: layer {layer}, expert {expert}: {fault}")

    def _read(self, layer: int, specs: Iterable[TensorSpec]) -> StoredTensors:
        return {
            (spec.projection, spec.suffix): self._tensor(
                tensor_name(self.fmt, layer, spec.expert, spec.projection, spec.suffix)
            )
            for spec in specs
        }

    def _tensor(self, name: str) -> Tensor:
        return self._given[name] if name in self._given else self.reader.get(name)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored center, values and factors."""
        return DTYPES[self.fmt.dtype]
