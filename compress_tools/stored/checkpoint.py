"""A ResMoE checkpoint opened for reading: validated, and its experts by layer and index."""

from collections.abc import Iterable, Mapping
from copy import copy
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from compress_tools.errors import FormatError, NumericalError
from compress_tools.format.codec import restore_expert
from compress_tools.format.dtypes import DTYPES, SAFETENSORS_NAMES
from compress_tools.format.parts.base import Rows, StoredTensors, TensorSpec
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
        extra = [name for name in self.reader.names if is_resmoe_name(name) and name not in expected]
        if extra:
            raise FormatError(
                f"{self.reader.path}: {len(extra)} tensors that the config does not name, first {extra[0]!r}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored center, values and factors."""
        return DTYPES[self.fmt.dtype]
