"""A ResMoE checkpoint opened for reading: validated, and its experts by layer and index."""

from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from math import prod
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from compress_tools.errors import FormatError, NumericalError
from compress_tools.format.codec import restore_expert
from compress_tools.format.dtypes import DTYPES, SAFETENSORS_NAMES
from compress_tools.format.parts.base import SCALE_DTYPE, Rows, StoredTensors, TensorSpec
from compress_tools.format.rest import ROW_CODES_DTYPE, decode_rows, row_names, rows_fault
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
        self._check_tensors()

    def with_tensors(self, given: Mapping[str, Tensor]) -> Self:
        """The same checkpoint with some tensors given by name, which are then not read from their files."""
        made = copy(self)
        made._given, made._last_shared = given, None
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
        """A tensor of ``plain_names``, decoded."""
        if name not in self.fmt.rest_tensors:
            return self.reader.get(name)
        codes, scales = map(self._tensor, row_names(name))
        return decode_rows(codes, scales, self.dtype)

    def check_rows(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes and scales of a matrix of ``fmt.rest_tensors``.

        Raises:
            FormatError: they hold what the format forbids.
        """
        codes, scales = map(self._tensor, row_names(name))
        if fault := rows_fault(codes, scales):
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
            NumericalError: NaN or Inf; names the tensor.
            FormatError: a mask disagrees with the config.
        """
        for name, spec in layer_tensors(self.fmt, layer).items():
            tensor = self._tensor(name)
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NumericalError(f"{self.reader.path}: {name!r} holds NaN or Inf")
            if fault := spec.fault(tensor):
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

    def _check_tensors(self) -> None:
        # Every expert has a tensor; a damaged count must not be counted up to.
        if self.fmt.num_experts > len(self.reader.names):
            raise FormatError(
                f"{self.reader.path}: config.json counts {self.fmt.num_experts} experts, in all there are "
                f"{len(self.reader.names)} tensors"
            )
        expected: set[str] = set()
        for layer in self.fmt.layers:
            for name, spec in layer_tensors(self.fmt, layer).items():
                expected.add(name)
                if name not in self.reader:
                    raise FormatError(f"{self.reader.path}: layer {layer}: tensor {name!r} is missing")
                found = (self.reader.shape(name), self.reader.dtype(name))
                if found != (spec.shape, SAFETENSORS_NAMES[spec.dtype]):
                    raise FormatError(
                        f"{self.reader.path}: {name!r} is {found[1]} {list(found[0])}, the config says "
                        f"{SAFETENSORS_NAMES[spec.dtype]} {list(spec.shape)}"
                    )
        expected.update(self._check_rest())
        extra = [name for name in self.reader.names if is_resmoe_name(name) and name not in expected]
        if extra:
            raise FormatError(
                f"{self.reader.path}: {len(extra)} tensors that the config does not name, first {extra[0]!r}"
            )

    def _check_rest(self) -> Iterator[str]:
        """Names of the tensors of all matrices in codes; their shapes fit each other."""
        for name in sorted(self.fmt.rest_tensors):
            if name in self.reader:
                raise FormatError(
                    f"{self.reader.path}: {name!r} is there beside its codes; the config says that codes are all"
                )
            for own in row_names(name):
                if own not in self.reader:
                    raise FormatError(f"{self.reader.path}: tensor {own!r} is missing")
                yield own
            codes, scales = row_names(name)
            shape = self.reader.shape(codes)
            if len(shape) != 2:
                raise FormatError(f"{self.reader.path}: {codes!r} has shape {list(shape)}, expected two dimensions")
            for own, dtype, size in ((codes, ROW_CODES_DTYPE, shape), (scales, SCALE_DTYPE, (shape[0], 1))):
                found = (self.reader.dtype(own), self.reader.shape(own))
                if found != (SAFETENSORS_NAMES[dtype], size):
                    raise FormatError(
                        f"{self.reader.path}: {own!r} is {found[0]} {list(found[1])}, expected "
                        f"{SAFETENSORS_NAMES[dtype]} {list(size)}"
                    )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored center, values and factors."""
        return DTYPES[self.fmt.dtype]
