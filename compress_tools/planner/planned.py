"""What a planner found: how each layer is stored, and the error that this predicts."""

from dataclasses import dataclass, field

from compress_tools.format.schema import LayerSpec


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of a plan.

    Attributes:
        spec: how it is stored; None: as it is.
        nbytes: as planned.
        dense_bytes: as it is.
        error: predicted, what the objective counts.
    """

    spec: LayerSpec | None
    nbytes: int
    dense_bytes: int
    error: float


@dataclass(frozen=True)
class Planned:
    """What the planner found.

    Attributes:
        layers: by decoder layer index; every MoE layer.
        best_uniform: the best single coder that keeps to budget and bounds, and its mean error; None where none does.
        exact: everything was measured, nothing scaled up from a sample.
        unrouted: by layer the experts that the calibration hardly routes to.
        skipped: by layer why no center was looked for.
    """

    layers: dict[int, PlannedLayer]
    best_uniform: tuple[str, float] | None
    exact: bool
    unrouted: dict[int, tuple[int, ...]] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)

    @property
    def expert_bytes_before(self) -> int:
        """Bytes of all experts as they are."""
        return sum(layer.dense_bytes for layer in self.layers.values())

    @property
    def expert_bytes_after(self) -> int:
        """Bytes of all experts as planned, uncompressed layers included."""
        return sum(layer.nbytes for layer in self.layers.values())

    @property
    def error(self) -> float:
        """Mean over all MoE layers of their predicted errors."""
        return sum(layer.error for layer in self.layers.values()) / len(self.layers)
