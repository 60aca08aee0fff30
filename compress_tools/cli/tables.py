"""Results as tables for people."""

from typing import Any

from rich.table import Table

from compress_tools.calibration.calibrate import Calibrated
from compress_tools.evaluation.perplexity import Evaluation
from compress_tools.output.target import CompressionTarget
from compress_tools.planner.planned import Planned
from compress_tools.progress.text import human_bytes, layer_table, titled_table
from compress_tools.report import CompressionReport
from compress_tools.stored.census import Census
from compress_tools.stored.inspection import Inspection
from compress_tools.stored.verify import Verification


def report_table(report: CompressionReport) -> Table:
    """Per-layer error and size of a compression, and its totals."""
    table = layer_table(report.layers)
    before, after, other = report.expert_bytes_before, report.expert_bytes_after, report.other_bytes
    table.add_section()
    table.add_row(
        "all experts",
        "",
        f"{report.relative_error:.4g}",
        "",
        human_bytes(before),
        human_bytes(after),
        f"{after / before:.3f}",
    )
    stored = report.other_after
    share = "1" if stored == other else f"{stored / other:.3f}"
    table.add_row("everything else", "", "", "", human_bytes(other), human_bytes(stored), share)
    total, left = before + other, after + stored
    table.add_row(
        "checkpoint",
        "",
        "",
        "",
        human_bytes(total),
        human_bytes(left),
        f"{left / total:.3f}",
    )
    return table


def plan_table(target: CompressionTarget) -> Table:
    """What a compression would write."""
    summary = target.summary()
    table = titled_table(f"plan for {target.source.architecture.title}", "", "before", "after", "ratio")
    for label, key in (
        ("expert params, center included", "expert_params"),
        ("expert bytes", "expert_bytes"),
        ("other bytes", "other_bytes"),
        ("total bytes", "total_bytes"),
    ):
        if key not in summary:
            continue
        before, after = summary[key]["before"], summary[key]["after"]
        show = human_bytes if key.endswith("bytes") else lambda count: f"{count:,}"
        table.add_row(label, show(before), show(after), f"{after / before:.3f}")
    table.add_section()
    table.add_row("layers compressed", "", f"{summary['layers_compressed']} of {summary['moe_layers']}", "")
    table.add_row("peak memory (estimate)", "", human_bytes(summary["peak_memory_bytes"]), "")
    return table


def planned_table(planned: Planned, optimize: str) -> Table:
    """What a plan for a byte budget stores each layer as, and the error it predicts."""
    what = "error" if optimize == "error" else "effect on output"
    table = titled_table("as planned", "layer", "coding", "bytes", f"predicted {what}")
    for index, layer in planned.layers.items():
        coding = "as it is" if layer.spec is None else layer.spec.describe()
        table.add_row(str(index), coding, f"{layer.nbytes / layer.dense_bytes:.3f}", f"{layer.error:.4g}")
    table.add_section()
    share = planned.expert_bytes_after / planned.expert_bytes_before
    table.add_row("mean", "", f"{share:.3f}", f"{planned.error:.4g}")
    if planned.best_uniform is not None:
        label, error = planned.best_uniform
        table.add_row("best single coder", label, "", f"{error:.4g}")
    return table


def inspection_table(found: Inspection) -> Table:
    """A checkpoint's layers."""
    table = titled_table(
        f"{found.model_type}, {found.num_experts} experts of {found.intermediate_size} x {found.hidden_size}, "
        f"{found.dtype}, format {found.format_version}, {found.written_by}",
        "layer", "coding", "dense", "disk", "resident", "ratio",
    )  # fmt: skip
    for layer in found.layers:
        table.add_row(
            str(layer.layer),
            layer.coding,
            human_bytes(layer.bytes_dense),
            human_bytes(layer.bytes_disk),
            human_bytes(layer.bytes_resident),
            f"{layer.bytes_disk / layer.bytes_dense:.3f}",
        )
    table.add_section()
    rest, exact = found.rest, found.other_bytes
    if rest is not None:
        exact -= rest.bytes_disk
        disk = human_bytes(rest.bytes_disk)
        coding, share = f"{rest.bits}-bit by row, {rest.matrices} matrices", f"{rest.bytes_disk / rest.bytes_dense:.3f}"
        table.add_row("rest", coding, human_bytes(rest.bytes_dense), disk, disk, share)
    table.add_row("rest", "as in the source", "", human_bytes(exact), human_bytes(exact), "")
    return table


def verdict_table(found: Verification) -> Table:
    """A verification's findings."""
    table = titled_table("verified", "layer", "experts", "relative error", "reported")
    rest = found.rest
    for verdict in found.layers:
        table.add_row(
            str(verdict.layer),
            str(verdict.experts),
            "-" if verdict.relative_error is None else f"{verdict.relative_error:.6f}",
            "-" if verdict.reported_relative_error is None else f"{verdict.reported_relative_error:.6f}",
        )
    if rest is not None:
        error = "-" if rest.relative_error is None else f"{rest.relative_error:.6f}"
        table.add_section()
        table.add_row("rest", f"{rest.matrices} matrices", error, "-")
    return table


def census_line(census: Census) -> str:
    """Where the tensors and files of a source went."""
    written_out = f", {census.written_out} written out a second time" if census.written_out else ""
    coded = f", {census.coded} of these in codes" if census.coded else ""
    tensors = f"{census.replaced} tensors replaced, {census.copied} copied{coded}{written_out}"
    return f"All of the source is accounted for: {tensors}; {census.files} files copied; {census.left_out} left out."


def evaluation_table(found: Evaluation) -> Table:
    """A text's figures, and what they were taken with."""
    compared = ["mean KL, nats", "99th percentile", "maximum", "top-1 agreement"] if found.against is not None else []
    table = titled_table(f"{found.text}, {found.tokens_scored:,} tokens scored", "", "perplexity", *compared)
    if found.against is None:
        table.add_row(found.model, f"{found.perplexity:.5g}")
    else:
        table.add_row(found.against, f"{found.original_perplexity:.5g}", *[""] * len(compared))
        # Rounding may leave a divergence of equal models below 0.
        divergences = (f"{max(kl or 0.0, 0):.4g}" for kl in (found.kl_nats, found.kl_p99_nats, found.kl_max_nats))
        table.add_row(found.model, f"{found.perplexity:.5g}", *divergences, f"{found.top1_agreement:.2%}")
    over = "" if found.kl_over is None else f"; KL over {found.kl_over}"
    table.caption = f"window {found.window}, stride {found.stride}, {found.backend}, {found.dtype}{over}"
    table.caption_justify = "left"
    return table


def tasks_table(model: str, found: dict[str, dict[str, Any]]) -> Table:
    """lm-eval's metrics, as it names them."""
    table = titled_table(f"{model}, lm-eval through vLLM", "task", "metric", "value")
    for task, metrics in found.items():
        for metric, value in metrics.items():
            table.add_row(task, metric, f"{value:.4f}" if isinstance(value, float) else str(value))
    return table


def calibration_lines(found: Calibrated) -> str:
    """What a calibration measured."""
    lines = f"Written to {found.path}: {len(found.layers)} layers, {found.tokens} tokens."
    if found.unreached:
        lines += f" No token reached {found.unreached} experts; they count as their layers' mean, and little."
    if found.coefficients is not None:
        table = ", ".join(f"{layer}: {value:.3g}" for layer, value in found.coefficients.items())
        lines += f"\nKL in nats for each unit of relative squared error, by layer: {table}"
    return lines
