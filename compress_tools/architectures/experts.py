"""One expert of a model, and how large experts are."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from compress_tools.format.schema import Projection

GATED: dict[Projection, str] = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}


@dataclass(frozen=True)
class ExpertWeights:
    """One expert's matrices as transformers' Linear layers hold them.

    Attributes:
        gate: ``gate_proj`` ``[I, H]``; None for two-matrix experts.
        up: ``up_proj`` ``[I, H]``.
        down: ``down_proj`` ``[H, I]``.
        biases: by projection, ``[I]`` for gate and up, ``[H]`` for down; empty without biases.
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    biases: Mapping[Projection, Tensor] = field(default_factory=dict)

    def matrix(self, projection: Projection) -> Tensor:
        """The matrix of a projection.

        Raises:
            KeyError: a two-matrix expert has no ``gate_proj``.
        """
        if projection == "gate_proj":
            if self.gate is None:
                raise KeyError(projection)
            return self.gate
        return self.up if projection == "up_proj" else self.down


@dataclass(frozen=True)
class MoESizes:
    """E ``num_experts``, H ``hidden_size``, I ``intermediate_size`` of the routed experts."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
