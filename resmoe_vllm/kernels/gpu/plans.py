"""What a layer's launches read: weights as pointers, and which of its products are taken once per token."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from resmoe_vllm.kernels.gpu.tiles import PLAIN, Tile, TileSpec
from resmoe_vllm.weights.alignment import RANK_MULTIPLE

Weight = tuple[Tile, TileSpec]


@dataclass(frozen=True)
class Factors:
    """``U V`` of one projection.

    Attributes:
        u: ``[E, I, columns]``.
        v: ``[E, rank, H]``.
        rank: rows of V.
        columns: of U in memory: the rank, or more with zeros.
        part: two projections with the same number share U.
    """

    u: Weight
    v: Weight
    rank: int
    columns: int
    part: int

    @property
    def width(self) -> int:
        """Columns of ``x V^T`` and ``a U``."""
        return -(-self.columns // RANK_MULTIPLE) * RANK_MULTIPLE


@dataclass(frozen=True)
class Plan:
    """One projection: what is multiplied once per token, what for each pair.

    Attributes:
        center: once per token; None where there is none or the tile holds it.
        tile: for each pair.
        factors: for each pair.
        bias: ``[E, I]``; of down it is the layer's (``LayerPlan``).
    """

    center: Weight | None
    tile: Weight | None
    factors: Factors | None
    bias: Tensor | None = None

    @property
    def is_decoded(self) -> bool:
        """Whether the tile is more than plain values."""
        return self.tile is not None and self.tile[1] != TileSpec(own_bits=PLAIN)

    @property
    def per_pair(self) -> int:
        """Products of each pair."""
        return (self.tile is not None) + (self.factors is not None)


@dataclass(frozen=True)
class GroupPlan:
    """Experts that are coded alike; E are its own.

    Attributes:
        experts: E.
        expert_map: int32, global expert -> row, -1 elsewhere; None where the layer has one group:
            the caller's is right.
    """

    gate: Plan
    up: Plan
    down: Plan
    experts: int
    expert_map: Tensor | None = None


@dataclass(frozen=True)
class LayerPlan:
    """A layer's weights as the kernels take them.

    Attributes:
        groups: with one group the layer's experts are its own.
        intermediate: I.
        hidden: H.
        down_bias: ``[E, H]``; with several groups by global expert.
        summed: int32, -1 for experts whose pairs aren't summed for the center's down product; None for all.
        paired: likewise, for experts that have a down product of their own.
    """

    groups: Sequence[GroupPlan]
    intermediate: int
    hidden: int
    down_bias: Tensor | None = None
    summed: Tensor | None = None
    paired: Tensor | None = None

    @property
    def experts(self) -> int:
        """On this rank."""
        return sum(group.experts for group in self.groups)
