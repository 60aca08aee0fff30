"""What a compression did: per-layer error and size, written beside the weights."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

RECIPE_NAME = "resmoe_recipe.json"
REPORT_NAME = "resmoe_report.json"
TIMINGS_NAME = "resmoe_timings.json"
CARD_NAME = "README.md"
# Where the source's own model card goes, since ours takes its place.
SOURCE_CARD_NAME = "SOURCE_README.md"
PLAN_NAME = "resmoe_plan.yaml"


@dataclass(frozen=True)
class LayerReport:
    """One compressed layer.

    Attributes:
        layer: decoder layer index.
        approximation_error: the paper's ``||T_k W_k - restored_k||_F^2 / I``, mean over experts.
        relative_error: ``sum_k ||T_k W_k - restored_k||_F^2 / sum_k ||W_k||_F^2``.
        residual_energy: ``sum_k ||T_k W_k - center||_F^2 / sum_k ||W_k||_F^2``, center as stored, before coding.
        bytes_before: bytes of the layer's experts in the source.
        bytes_after: bytes of center, residuals and masks.
        center_start: which start of the fixed point won.
        center_objective: the barycenter objective after each iteration.
        assignment_gap: largest relative duality gap of the alignment's assignments; 0 is optimal.
    """

    layer: int
    approximation_error: float
    relative_error: float
    residual_energy: float
    bytes_before: int
    bytes_after: int
    center_start: str
    center_objective: list[float]
    assignment_gap: float


@dataclass(frozen=True)
class CompressionReport:
    """The whole run. ``seconds`` (by layer and stage) goes to a file of its own: it differs from run to run.

    ``shards`` are the SHA-256 checksums of the weight files, by name; ``decoded`` counts the source's quantised tensors
    by their form, ``left_out`` says why tensors and files of the source are not in the output, ``origin`` from which
    repository, revision and commit a source was fetched. ``other_bytes_after`` is None where all but the experts is as
    in the source.
    """

    layers: list[LayerReport]
    expert_bytes_before: int
    expert_bytes_after: int
    other_bytes: int
    seconds: dict[str, dict[str, float]]
    shards: dict[str, str]
    decoded: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    other_bytes_after: int | None = None

    @property
    def relative_error(self) -> float:
        """Plain mean of the layers' relative errors."""
        return sum(layer.relative_error for layer in self.layers) / len(self.layers)

    @property
    def errors(self) -> dict[int, float]:
        """Relative error by layer."""
        return {layer.layer: layer.relative_error for layer in self.layers}

    @property
    def other_after(self) -> int:
        """Bytes of all tensors but the routed experts' in the output."""
        return self.other_bytes if self.other_bytes_after is None else self.other_bytes_after

    def content(self) -> dict[str, Any]:
        """The report file's content: everything that is the same in every run."""
        before, after, other = self.expert_bytes_before, self.expert_bytes_after, self.other_bytes
        return {
            "expert_bytes_before": before,
            "expert_bytes_after": after,
            "expert_bytes_ratio": after / before,
            "other_bytes": other,
            **({} if self.other_bytes_after is None else {"other_bytes_after": self.other_bytes_after}),
            "total_bytes_ratio": (after + self.other_after) / (before + other),
            "mean_relative_error": self.relative_error,
            "layers": [asdict(layer) for layer in self.layers],
            "shards": self.shards,
            **({"decoded": self.decoded} if self.decoded else {}),
            **({"left_out": self.left_out} if self.left_out else {}),
            **({"source": self.origin} if self.origin else {}),
        }


# What the report file can hold, and each of its layers.
REPORT_KEYS = frozenset(
    {"expert_bytes_before", "expert_bytes_after", "expert_bytes_ratio", "other_bytes", "other_bytes_after"}
    | {"total_bytes_ratio", "mean_relative_error", "layers", "shards", "decoded", "left_out", "source", "plan"}
)
LAYER_KEYS = frozenset(each.name for each in fields(LayerReport))
