"""Bytes, seconds and layers as people read them."""

from rich.table import Table

from compress_tools.report import LayerReport


def human_bytes(count: float) -> str:
    """Bytes in the largest decimal unit that leaves at least 1: ``1.5 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def titled_table(title: str, *columns: str) -> Table:
    """An empty table, its first column to the left."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def layer_table(layers: list[LayerReport]) -> Table:
    """Per-layer error and size."""
    table = titled_table(
        "compressed", "layer", "error", "relative error", "residual energy", "before", "after", "ratio"
    )
    for layer in layers:
        table.add_row(
            str(layer.layer),
            f"{layer.approximation_error:.5g}",
            f"{layer.relative_error:.4g}",
            f"{layer.residual_energy:.4g}",
            human_bytes(layer.bytes_before),
            human_bytes(layer.bytes_after),
            f"{layer.bytes_after / layer.bytes_before:.3f}",
        )
    return table


def human_s(seconds: float | None) -> str:
    """``1:02:03`` or ``2:03``; ``?`` for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
