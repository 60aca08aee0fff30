"""What a compression did: per-layer error and size, written beside the weights."""

from dataclasses import asdict, dataclass
from typing import Any

from compress_tools.architectures.registry import find_architecture
from compress_tools.config import CompressionConfig
from compress_tools.outline import Outline

RECIPE_NAME = "resmoe_recipe.json"
REPORT_NAME = "resmoe_report.json"
TIMINGS_NAME = "resmoe_timings.json"
CARD_NAME = "README.md"
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

    ``shards`` are the SHA-256 checksums of the weight files, by name.
    """

    layers: list[LayerReport]
    expert_bytes_before: int
    expert_bytes_after: int
    other_bytes: int
    seconds: dict[str, dict[str, float]]
    shards: dict[str, str]

    @property
    def relative_error(self) -> float:
        """Plain mean of the layers' relative errors."""
        return sum(layer.relative_error for layer in self.layers) / len(self.layers)

    def content(self) -> dict[str, Any]:
        """The report file's content: everything that is the same in every run."""
        before, after, other = self.expert_bytes_before, self.expert_bytes_after, self.other_bytes
        return {
            "expert_bytes_before": before,
            "expert_bytes_after": after,
            "expert_bytes_ratio": after / before,
            "other_bytes": other,
            "total_bytes_ratio": (after + other) / (before + other),
            "mean_relative_error": self.relative_error,
            "layers": [asdict(layer) for layer in self.layers],
            "shards": self.shards,
        }


def command_line(outline: Outline, dst_name: str) -> str:
    """The ``resmoe compress`` command that repeats a run, every option that matters, or the plan that it followed."""
    if outline.plan_text is not None:
        return f"resmoe compress {outline.source} {dst_name} --plan {PLAN_NAME}"
    idle = CompressionConfig(**outline.recipe).without_effect()
    options = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in outline.recipe.items() if key not in idle)
    return f"resmoe compress {outline.source} {dst_name} {options}"


def model_card(outline: Outline, dst_name: str, report: CompressionReport) -> str:
    """README.md of the compressed checkpoint."""
    content = report.content()
    before, after, other = report.expert_bytes_before, report.expert_bytes_after, report.other_bytes
    rows = "\n".join(
        f"| {layer.layer} | {layer.approximation_error:.6g} | {layer.relative_error:.6g} "
        f"| {layer.bytes_before} | {layer.bytes_after} |"
        for layer in report.layers
    )
    family = find_architecture(outline.config)
    serve = f"vllm serve {dst_name}" if family.vllm else f"# {family.title} runs in {family.runs_in}"
    return f"""---
library_name: {"vllm" if family.vllm else "transformers"}
tags: [resmoe, moe, compressed]
---

# {dst_name}

`{outline.source_name}` ({outline.title}), experts compressed by ResMoE (arXiv:2503.06881): one center
expert for each MoE layer, and for each expert a compressed residual. One-shot, no data, no retraining.

```
{command_line(outline, dst_name)}
{serve}
```

| | bytes before | bytes after | ratio |
|---|---|---|---|
| routed experts | {before} | {after} | {content["expert_bytes_ratio"]:.4f} |
| everything else | {other} | {other} | 1 |
| whole checkpoint | {before + other} | {after + other} | {content["total_bytes_ratio"]:.4f} |

{len(report.layers)} of {outline.moe_layers} MoE layers are compressed. Error: `||T_k W_k - restored_k||_F^2 / I`,
mean over experts, and relative to `||W_k||_F^2`.

| layer | error | relative | bytes before | bytes after |
|---|---|---|---|---|
{rows}
"""
