"""The ways that checkpoints lay experts out, and one source object that reads any of them."""

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from compress_tools.architectures.base import ExpertWeights, FusedNames, MoEArchitecture, MoESizes
from compress_tools.architectures.registry import find_architecture
from compress_tools.errors import CheckpointError, NumericalError, UnsupportedArchitectureError
from compress_tools.format.schema import ExpertNames, Projection
from compress_tools.source.reader import CheckpointReader

FUSED_GATE_UP, FUSED_DOWN, FUSED_BIAS = "gate_up_proj", "down_proj", "_bias"


def expert_name(names: ExpertNames, layer: int, expert: int, projection: Projection) -> str:
    """Name of one expert matrix in a checkpoint that stores experts one by one, with ``.weight``."""
    return f"{names.expert_stem(layer, expert)}.{names.projections[projection]}.weight"


@dataclass(frozen=True)
class MoESource:
    """A source checkpoint seen as MoE layers of experts.

    Attributes:
        reader: the checkpoint.
        architecture: its family.
        sizes: E, H, I.
        names: names that the ResMoE checkpoint will use.
        layers: layer indices that hold experts, ascending.
        fused_names: where experts stored as 3-D tensors are; None where they are stored one by one.
    """

    reader: CheckpointReader
    architecture: MoEArchitecture
    sizes: MoESizes
    names: ExpertNames
    layers: tuple[int, ...]
    fused_names: FusedNames | None

    @property
    def fused(self) -> bool:
        """Experts are stored as 3-D tensors."""
        return self.fused_names is not None

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The family's projections in design-matrix order."""
        return tuple(self.names.projections)

    def expected(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors of a layer that compression replaces."""
        size_e, size_h, size_i = self.sizes.num_experts, self.sizes.hidden_size, self.sizes.intermediate_size
        if self.fused_names is None:
            shapes: dict[Projection, tuple[int, ...]] = {"down_proj": (size_h, size_i)}
            return {
                expert_name(self.names, layer, expert, p): shapes.get(p, (size_i, size_h))
                for expert in range(size_e)
                for p in self.projections
            }
        stem = fused_stem(self.fused_names, layer)
        if not self.fused_names.interleaved:
            return {
                f"{stem}.{FUSED_GATE_UP}": (size_e, 2 * size_i, size_h),
                f"{stem}.{FUSED_DOWN}": (size_e, size_h, size_i),
            }
        return {
            f"{stem}.{FUSED_GATE_UP}": (size_e, size_h, 2 * size_i),
            f"{stem}.{FUSED_GATE_UP}{FUSED_BIAS}": (size_e, 2 * size_i),
            f"{stem}.{FUSED_DOWN}": (size_e, size_i, size_h),
            f"{stem}.{FUSED_DOWN}{FUSED_BIAS}": (size_e, size_h),
        }

    def check(self, layer: int) -> None:
        """Every expert is there, in the expected shape. Reads no weight.

        Raises:
            CheckpointError: names the missing or misshapen tensor.
        """
        for name, shape in self.expected(layer).items():
            if name not in self.reader:
                raise CheckpointError(
                    f"{self.reader.path}: layer {layer}: not all {self.sizes.num_experts} experts are complete: "
                    f"tensor {name!r} is missing"
                )
            if self.reader.shape(name) != shape:
                raise CheckpointError(
                    f"{self.reader.path}: {name!r} has shape {list(self.reader.shape(name))}, "
                    f"config.json says {list(shape)}"
                )

    def read_expert(self, layer: int, expert: int) -> ExpertWeights:
        """Read one expert.

        Raises:
            CheckpointError: unreadable.
            NumericalError: a weight is NaN or infinite; names the tensor.
        """
        if self.fused_names is None:
            matrices = {p: self._read(expert_name(self.names, layer, expert, p)) for p in self.projections}
            return ExpertWeights(matrices.get("gate_proj"), matrices["up_proj"], matrices["down_proj"])
        stem = fused_stem(self.fused_names, layer)
        gate_up = self._read(f"{stem}.{FUSED_GATE_UP}", expert)
        down = self._read(f"{stem}.{FUSED_DOWN}", expert)
        if not self.fused_names.interleaved:
            gate, up = gate_up.chunk(2)
            return ExpertWeights(gate, up, down)
        bias = self._read(f"{stem}.{FUSED_GATE_UP}{FUSED_BIAS}", expert)
        down_bias = self._read(f"{stem}.{FUSED_DOWN}{FUSED_BIAS}", expert)
        biases: dict[Projection, Tensor] = {"gate_proj": bias[::2], "up_proj": bias[1::2], "down_proj": down_bias}
        return ExpertWeights(gate_up[:, ::2].T, gate_up[:, 1::2].T, down.T, biases)

    def output_name(self, name: str) -> str:
        """Name that a copied tensor gets: as it is, or the family's usual name for a fused checkpoint's."""
        if self.fused:
            for pattern, replacement in self.architecture.renames:
                name = re.sub(pattern, replacement, name)
        return name

    def _read(self, name: str, expert: int | None = None) -> Tensor:
        tensor = self.reader.get(name) if expert is None else self.reader.get_row(name, expert)
        if not torch.isfinite(tensor).all():
            where = "" if expert is None else f", expert {expert},"
            raise NumericalError(f"{self.reader.path}: {name!r}{where} holds NaN or Inf; the checkpoint is damaged")
        return tensor


def open_source(reader: CheckpointReader) -> MoESource:
    """Find the family and the layout of a checkpoint; check that all experts are there. Reads no weight.

    Raises:
        UnsupportedArchitectureError: unknown family, or no experts.
        CheckpointError: an expert is missing or misshapen.
    """
    architecture = find_architecture(reader.config)
    sizes = architecture.sizes(reader.config)
    names = architecture.expert_names(reader.config)
    layers: list[int] = []
    fused = None
    if architecture.per_expert_source:
        layers = architecture.find_layers(architecture.expert, reader.names, reader.config)
    if not layers and architecture.fused is not None:
        gate_up = f"{architecture.fused.experts}.{FUSED_GATE_UP}"
        layers = architecture.find_layers(gate_up, reader.names, reader.config)
        fused = architecture.fused if layers else None
    if not layers:
        raise UnsupportedArchitectureError(
            f"{reader.path}: no experts found under {architecture.expert!r}; not an MoE checkpoint"
        )
    check_whole(architecture, reader, layers)
    source = MoESource(reader, architecture, sizes, names, tuple(layers), fused)
    for layer in layers:
        source.check(layer)
    return source


def check_whole(architecture: MoEArchitecture, reader: CheckpointReader, moe_layers: Collection[int]) -> None:
    """Raises CheckpointError where a layer that config.json counts, or a tensor of other MoE layers, is missing."""
    if absent := architecture.absent(reader.names, reader.config, moe_layers):
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise CheckpointError(
            f"{reader.path}: incomplete: there is no {', '.join(absent[:3])}{more}; config.json counts "
            f"{architecture.num_layers(reader.config)} layers"
        )


def fused_stem(fused: FusedNames, layer: int) -> str:
    """Name of a layer's fused experts, without the tensor's own name."""
    return fused.experts.replace("{layer}", str(layer))


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """GPT-OSS's order: gate and up alternate in the last dimension, ``[..., I]`` twice to ``[..., 2I]``."""
    return torch.stack([gate, up], dim=-1).flatten(-2)


def dense_tensors(
    architecture: MoEArchitecture, names: ExpertNames, layer: int, experts: list[ExpertWeights]
) -> dict[str, Tensor]:
    """All experts of a layer as the family's usual checkpoint tensors; the inverse of reading them."""
    if architecture.per_expert_source or architecture.fused is None:
        return {
            expert_name(names, layer, number, projection): weights.matrix(projection).contiguous()
            for number, weights in enumerate(experts)
            for projection in names.projections
        }
    stem = fused_stem(architecture.fused, layer)
    return {
        f"{stem}.{FUSED_GATE_UP}": torch.stack([interleave(w.matrix("gate_proj").T, w.up.T) for w in experts]),
        f"{stem}.{FUSED_GATE_UP}{FUSED_BIAS}": torch.stack(
            [interleave(w.biases["gate_proj"], w.biases["up_proj"]) for w in experts]
        ),
        f"{stem}.{FUSED_DOWN}": torch.stack([w.down.T for w in experts]).contiguous(),
        f"{stem}.{FUSED_DOWN}{FUSED_BIAS}": torch.stack([w.biases["down_proj"] for w in experts]),
    }
