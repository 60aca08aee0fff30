"""A probe's picture: energy curves of residual, weight and random control, and predicted error against bytes."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from compress_tools.errors import ConfigError
from compress_tools.output.output_file import check_output_file
from compress_tools.planner.config import MENU_METHODS
from compress_tools.probe.energy import SHARES, Curves
from compress_tools.probe.result import ProbeResult
from compress_tools.probe.verdict import center_title

_LINES = {"residual": ("#2563eb", "-"), "weight": ("#6b7280", "-"), "random": ("#111827", ":")}
_CODER_COLORS = dict(zip(MENU_METHODS, ("#dc2626", "#2563eb", "#d97706", "#0d9488", "#9333ea", "#64748b"), strict=True))
_CENTER_LINES = {None: "--", 4: ":", 8: "-", 16: "-."}


def check_picture_path(path: str) -> None:
    """Refuse a picture that could not be written, before the work.

    Raises:
        ConfigError: not a .png, or it can't be written.
    """
    if Path(path).suffix.lower() != ".png":
        raise ConfigError(f"--picture {path}: a PNG is written; end the name in .png")
    check_output_file("--picture", path)


def draw_probe(found: ProbeResult, path: str | Path) -> None:
    """Write the PNG ``path``."""
    figure = Figure(figsize=(16, 5), layout="constrained")
    spectrum, magnitude, errors = figure.subplots(1, 3, width_ratios=(1, 1, 1.35))
    _draw_curves(spectrum, "singular values", [layer.spectrum for layer in found.layers])
    _draw_curves(magnitude, "entries by magnitude", [layer.magnitude for layer in found.layers])
    _draw_errors(errors, found)
    verdict = found.verdict
    figure.suptitle(
        f"{found.model}: does a center pay? {verdict.center_pays.capitalize()}. {verdict.sentences[0]}\n"
        f"Sampled: {len(found.layers)} of {found.num_layers} layers, "
        f"{len(found.experts)} of {found.num_experts} experts, {found.rows} of {found.shape[0]} rows",
        fontsize=12,
    )
    figure.savefig(path, dpi=120)


def _draw_curves(axis: Any, title: str, curves: list[Curves]) -> None:
    for name, (color, style) in _LINES.items():
        for number, layer in enumerate(curves):
            label = name if number == 0 else None
            axis.plot((0, *SHARES), (0, *layer[name]), color=color, linestyle=style, alpha=0.8, label=label)
    axis.plot((0, 1), (0, 1), color="#d1d5db", linewidth=1, zorder=0)
    axis.set(title=f"energy in the largest {title}\n(a line for each layer)", xlabel="share kept", ylabel="energy")
    axis.set(xlim=(0, 1), ylim=(0, 1.02))
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.legend(loc="lower right", frameon=False)
    axis.grid(alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_errors(axis: Any, found: ProbeResult) -> None:
    points: dict[tuple[str, int | None], list[tuple[float, float]]] = defaultdict(list)
    for one in found.predictions:
        if one.error > 0:
            points[one.coder, one.center_bits].append((one.used_ratio, one.error))
    for (coder, bits), line in points.items():
        color = _CODER_COLORS[coder]
        axis.plot(
            *zip(*sorted(line), strict=True),
            color=color,
            linestyle=_CENTER_LINES[bits],
            marker="o" if bits is None else "s",
            markersize=5,
            markerfacecolor="white" if bits is None else color,
            label=f"{coder}, {center_title(bits)} center",
        )
    axis.set(title="predicted error\n(zero errors are not drawn)", xlabel="share of the bytes", ylabel="")
    axis.set_ylabel("squared error over weight energy")
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    axis.grid(alpha=0.2, which="both")
    axis.spines[["top", "right"]].set_visible(False)
