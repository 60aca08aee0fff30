"""A found plan as the text of a plan file, what was predicted in comments."""

import re
import shlex
from typing import Any

import yaml

from compress_tools.config import CompressionConfig
from compress_tools.format.schema import LayerSpec
from compress_tools.planner.config import PlannerConfig, center_recipe
from compress_tools.planner.output_weights import unrouted_text
from compress_tools.planner.plan_file import DENSE, PLAN_VERSION, REST_BITS, spec_content
from compress_tools.planner.planned import Planned


def plan_text(
    planned: Planned, config: CompressionConfig, request: PlannerConfig, source_name: str, digest: str
) -> str:
    """A plan as YAML, what was predicted in comments.

    Args:
        planned: what the planner found.
        config: how centers are found.
        request: what was asked.
        source_name: of the checkpoint.
        digest: of source and request.
    """
    what = "relative squared error" if request.optimize == "error" else "relative effect on the layer's output"
    before, after = planned.expert_bytes_before, planned.expert_bytes_after
    asked = ", ".join(f"{key} {value}" for key, value in request.model_dump(exclude_none=True).items())
    given = "" if config.calibration is None else f" --calibration {shlex.quote(config.calibration)}"
    lines = [
        f"# How the experts of {source_name} are stored. Edit, then: resmoe compress SRC DST --plan THIS_FILE{given}",
        f"# Asked for: {asked}",
        f"# Expert bytes: {after} of {before} ({after / before:.4f}). Error: {what}, "
        + ("measured on all weights." if planned.exact else "estimated from a sample of experts and rows."),
        f"# Mean error of all layers: {planned.error:.6g}",
    ]
    if planned.best_uniform is not None:
        label, error = planned.best_uniform
        lines.append(f"# Mean error of the best single coder within the budget: {error:.6g} ({label})")
    lines += [f"# Layer {layer}: {unrouted_text(experts)}" for layer, experts in planned.unrouted.items()]
    lines += [f"# Layer {layer}: {why}" for layer, why in planned.skipped.items()]
    recipe = [f"{key}: {value}" for key, value in center_recipe(config).items()]
    recipe += [] if config.rest_bits == 16 else [f"{REST_BITS}: {config.rest_bits}"]
    lines += [f"version: {PLAN_VERSION}", f"request: '{digest}'", *recipe, "layers:"]
    for index, layer in planned.layers.items():
        share = layer.nbytes / layer.dense_bytes
        comment = f"# error {layer.error:.6g}, {layer.nbytes} of {layer.dense_bytes} bytes ({share:.4f})"
        lines += [f"  {index}: {DENSE if layer.spec is None else ''} {comment}", *_spec_lines(layer.spec)]
    return "\n".join(lines) + "\n"


def predicted_errors(text: str) -> dict[int, float]:
    """What ``plan_text`` noted of each layer that is compressed: the only place of a kept plan that says it."""
    return {int(found[1]): float(found[2]) for found in re.finditer(r"^  (\d+):  # error (\S+), ", text, re.MULTILINE)}


def _spec_lines(spec: LayerSpec | None) -> list[str]:
    if spec is None:
        return []
    content = spec_content(spec)
    lines = ["    center:", *(f"    - {_flow(part)}" for part in content["center"])]
    if not content["center"]:
        lines = ["    center: []"]
    for group in content.get("groups", []):
        if group is content["groups"][0]:
            lines.append("    groups:")
        lines += [f"    - experts: {group['experts']}", "      residual:"]
        lines += [f"      - {_flow(part)}" for part in group["residual"]]
    if "groups" not in content:
        lines += ["    residual:", *(f"    - {_flow(part)}" for part in content["residual"])]
    return lines


def _flow(part: dict[str, Any]) -> str:
    return yaml.safe_dump(part, default_flow_style=True, sort_keys=False, width=10**6).strip()
