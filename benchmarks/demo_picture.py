"""The demo's picture: one panel a figure, one bar a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

COLORS = ("#6b7280", "#2563eb", "#0d9488")


def draw(names: Sequence[str], panels: Mapping[str, Sequence[float]], path: Path) -> None:
    """Write bars to `path`, one panel for each entry of `panels`: its title and one value for each name."""
    figure = Figure(figsize=(13, 2.6), layout="tight")
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        bars = axis.barh(names, values, color=COLORS[: len(names)])
        axis.bar_label(bars, labels=[f"{value:.3g}" for value in values], padding=3)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, max(values) * 1.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", labelsize=8)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=150)
