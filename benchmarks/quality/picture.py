"""The comparison as a picture: what a method adds to the perplexity, against bytes; one panel a model.

`python -m benchmarks.quality.picture quality-cpu.json quality-pareto.png` draws it from rows measured before.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.quality.compare import Measured

# Shares added to the original's perplexity that a panel ends at; what lies beyond stands at its edge.
FLOOR, CEILING = 1e-3, 1.0
# method -> (color, marker); those that differ in bits alone are one line
STYLES = {
    "plain pruning (UP)": ("#9ca3af", "v"),
    "plain pruning, 4-bit values": ("#6b7280", "^"),
    "plain SVD": ("#9ca3af", "x"),
    "plain 2, 3, 4, 8 bits": ("#111827", "o"),
    "GGUF Q4_0, Q8_0": ("#57534e", "s"),
    "merging, plain average": ("#d97706", "x"),
    "merging, Git Re-Basin average": ("#d97706", "+"),
    "merging, barycenter": ("#d97706", "1"),
    "merging, M-SMoE": ("#d97706", "D"),
    "mean center + UP": ("#93c5fd", "v"),
    "Git Re-Basin center + UP": ("#60a5fa", "v"),
    "ResMoE (UP)": ("#2563eb", "v"),
    "ResMoE (SVD)": ("#7c3aed", "x"),
    "ResMoE (UP), 4-bit center and values": ("#0d9488", "^"),
    "ResMoE, 4-bit center, 2 bits + low rank": ("#65a30d", "P"),
    "ResMoE, quantised center and residual": ("#dc2626", "o"),
    "trellis 2, 3, 4 bits": ("#ea580c", "s"),
    "ResMoE, trellis center and residual": ("#7f1d1d", "s"),
    "ResMoE planner": ("#db2777", "*"),
    "ResMoE planner, by output": ("#9d174d", "*"),
}


def line_of(method: str) -> str:
    """The line that a method's point belongs to."""
    if method in STYLES:
        return method
    if method.startswith("GGUF"):
        return "GGUF Q4_0, Q8_0"
    if method.startswith("plain"):
        return "plain 2, 3, 4, 8 bits"
    if method.startswith("trellis"):
        return "trellis 2, 3, 4 bits"
    return f"ResMoE, {'trellis' if method.endswith('trellis') else 'quantised'} center and residual"


def draw(measured: Sequence[Measured], path: Path) -> None:
    """Write the PNG ``path`` from the rows of the section "bytes" and the originals."""
    models = list(dict.fromkeys(one.model for one in measured if one.section == "original"))
    figure = Figure(figsize=(7.2 * len(models) + 3.4, 6), layout="constrained")
    axes = figure.subplots(1, len(models), squeeze=False)[0]
    for axis, model in zip(axes, models, strict=True):
        rows = [one for one in measured if one.model == model]
        _draw_model(axis, model, [one for one in rows if one.section == "bytes"], rows[0].perplexity)
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    order = [name for name in STYLES if name in handles]
    figure.legend([handles[name] for name in order], order, loc="outside right center", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _draw_model(axis: Any, model: str, rows: list[Measured], original: float) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in rows:
        lines.setdefault(line_of(one.name), []).append((one.ratio, one.perplexity / original - 1))
    for name, points in lines.items():
        color, marker = STYLES[name]
        points.sort()
        shown = [(x, min(max(y, FLOOR), CEILING)) for x, y in points]
        axis.plot(
            *zip(*shown, strict=True),
            color=color,
            marker=marker,
            markersize=11 if marker == "*" else 6,
            linewidth=2 if name.startswith("ResMoE planner") else 1.2,
            linestyle="--" if name.startswith(("plain", "GGUF")) else ":" if name.startswith("merging") else "-",
            label=name,
            zorder=3 if name.startswith("ResMoE planner") else 2,
            clip_on=False,
        )
    axis.set_title(f"{model}: original's perplexity {original:.4g}", fontsize=11)
    axis.set(xlabel="expert bytes, share of the original's, everything counted")
    axis.set_ylabel(f"added to the original's perplexity (at the bottom edge: {FLOOR:.1%} or less)")
    axis.set_yscale("log")
    axis.set_ylim(FLOOR, CEILING)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.grid(alpha=0.2, which="both")
    axis.spines[["top", "right"]].set_visible(False)


def read_measured(path: Path) -> list[Measured]:
    """The measurements in a file of `python -m benchmarks.quality --json`."""
    names = {one.name for one in fields(Measured)} - {"name"}
    return [
        Measured(name=row["method"], **{key: value for key, value in row.items() if key in names})
        for row in json.loads(path.read_text())["rows"]
        if "method" in row
    ]


if __name__ == "__main__":
    draw(read_measured(Path(sys.argv[1])), Path(sys.argv[2]))
