"""What the tool must know of a model family: where its experts are and how they are laid out on disk."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress_tools.checkpoint_reader import CheckpointReader
from compress_tools.errors import CheckpointError, NumericalError, UnsupportedArchitectureError
from compress_tools.format.schema import ExpertNames, Projection


@dataclass(frozen=True)
class ExpertWeights:
    """One expert's matrices as transformers' Linear layers hold them.

    Attributes:
        gate: ``gate_proj`` ``[I, H]``; None for two-matrix experts.
        up: ``up_proj`` ``[I, H]``.
        down: ``down_proj`` ``[H, I]``.
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class MoESizes:
    """E ``num_experts``, H ``hidden_size``, I ``intermediate_size`` of the routed experts."""

    num_experts: int
    hidden_size: int
    intermediate_size: int


@dataclass(frozen=True)
class MoEArchitecture:
    """One model family with experts stored one by one.

    Attributes:
        model_type: ``model_type`` of config.json.
        title: the family's name for people.
        names: where an expert's matrices are on disk, without the final ``.weight``.
        num_experts_keys: config.json's key of E; transformers has renamed some, so the first present counts.
        intermediate_size_key: config.json's key of I.
    """

    model_type: str
    title: str
    names: ExpertNames
    num_experts_keys: tuple[str, ...]
    intermediate_size_key: str
    weight_suffix: str = field(default=".weight")

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The family's projections in design-matrix order."""
        return tuple(self.names.projections)

    def sizes(self, config: dict[str, Any]) -> MoESizes:
        """Read E, H and I from config.json.

        Raises:
            UnsupportedArchitectureError: a key is missing or not a positive whole number.
        """
        values = []
        for keys in (self.num_experts_keys, ("hidden_size",), (self.intermediate_size_key,)):
            key = next((key for key in keys if key in config), keys[0])
            value = config.get(key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UnsupportedArchitectureError(
                    f"config.json: {key} of a {self.model_type} model is {value!r}, expected a positive whole number"
                )
            values.append(value)
        return MoESizes(*values)

    def moe_layers(self, names: Iterable[str]) -> list[int]:
        """Decoder layer indices that hold experts, ascending."""
        pattern = re.escape(self.names.expert).replace(r"\{layer\}", r"(\d+)").replace(r"\{expert\}", r"\d+")
        found = (re.match(pattern + r"\.", name) for name in names)
        return sorted({int(match.group(1)) for match in found if match})

    def source_name(self, layer: int, expert: int, projection: Projection) -> str:
        """Name of one expert matrix in the source checkpoint."""
        stem = self.names.expert.replace("{layer}", str(layer)).replace("{expert}", str(expert))
        return f"{stem}.{self.names.projections[projection]}{self.weight_suffix}"

    def layer_source_names(self, layer: int, sizes: MoESizes) -> list[str]:
        """Names of all tensors of a layer that compression replaces."""
        return [
            self.source_name(layer, expert, projection)
            for expert in range(sizes.num_experts)
            for projection in self.projections
        ]

    def check_layer(self, reader: CheckpointReader, layer: int, sizes: MoESizes) -> None:
        """Every expert is there, in the expected shape. Reads no weight.

        Raises:
            CheckpointError: names the missing or misshapen tensor.
        """
        for expert in range(sizes.num_experts):
            for projection in self.projections:
                name = self.source_name(layer, expert, projection)
                if name not in reader:
                    raise CheckpointError(
                        f"{reader.path}: layer {layer}: expert {expert} of {sizes.num_experts} is incomplete: "
                        f"tensor {name!r} is missing"
                    )
                expected = (sizes.intermediate_size, sizes.hidden_size)
                expected = expected[::-1] if projection == "down_proj" else expected
                if reader.shape(name) != expected:
                    raise CheckpointError(
                        f"{reader.path}: {name!r} has shape {list(reader.shape(name))}, "
                        f"config.json says {list(expected)}"
                    )

    def read_expert(self, reader: CheckpointReader, layer: int, expert: int) -> ExpertWeights:
        """Read one expert.

        Raises:
            CheckpointError: a matrix is missing or unreadable.
            NumericalError: a weight is NaN or infinite; names the tensor.
        """
        weights: dict[str, Tensor] = {}
        for projection in self.projections:
            name = self.source_name(layer, expert, projection)
            weights[projection] = tensor = reader.get(name)
            if not torch.isfinite(tensor).all():
                raise NumericalError(f"{reader.path}: {name!r} holds NaN or Inf; the source checkpoint is damaged")
        return ExpertWeights(weights.get("gate_proj"), weights["up_proj"], weights["down_proj"])

    def expert_tensors(self, layer: int, expert: int, weights: ExpertWeights) -> dict[str, Tensor]:
        """One expert as the source checkpoint's tensors: the inverse of ``read_expert``."""
        matrices = {"gate_proj": weights.gate, "up_proj": weights.up, "down_proj": weights.down}
        return {self.source_name(layer, expert, p): matrices[p].contiguous() for p in self.projections}
