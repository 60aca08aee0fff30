"""A probe's findings as tables and sentences for people."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from compress_tools.probe.energy import SHARES
from compress_tools.probe.result import LayerProbe, ProbeResult
from compress_tools.probe.verdict import Prediction, center_title

# Shares of singular values and of entries that the table shows; JSON and picture have the whole curves.
SPECTRUM_SHARE, MAGNITUDE_SHARE = 0.1, 0.25


def probe_tables(found: ProbeResult) -> Group:
    """What was sampled, residuals and curves by layer, errors by coder and size, the answer."""
    return Group(_sample_text(found), "", _layer_table(found), "", _error_table(found), "", *_answer(found))


def _sample_text(found: ProbeResult) -> str:
    rows = f"{found.rows} of {found.shape[0]} rows" if found.rows < found.shape[0] else "all rows"
    layers = ", ".join(str(layer.layer) for layer in found.layers)
    text = (
        f"{found.model}, a sample: {_plural(len(found.layers), 'layer')} ({layers}) of {found.num_layers}, "
        f"{len(found.experts)} of {found.num_experts} experts, {rows}; {found.seconds:.1f} s."
    )
    if found.rows < found.shape[0]:
        text += (
            " Singular values are those of a subsample of rows and columns; the random control is thinned alike, "
            "but low rank may do better on whole matrices."
        )
    return text


def _layer_table(found: ProbeResult) -> Table:
    table = Table(
        title="energy; in the last two columns that of residual / weight / random, %",
        title_justify="left",
    )
    table.add_column("layer")
    for column in (
        "residual before",
        "after alignment",
        f"top {SPECTRUM_SHARE:.0%} singular values",
        f"top {MAGNITUDE_SHARE:.0%} entries",
    ):
        table.add_column(column, justify="right")
    for layer in found.layers:
        table.add_row(
            str(layer.layer),
            f"{layer.residual.before:.2%}",
            f"{layer.residual.after:.2%}",
            *(_three(curves, share) for curves, share in _shown(layer)),
        )
    table.add_section()
    table.add_row("unrelated", f"{found.control.before:.2%}", f"{found.control.after:.2%}", "", "")
    return table


def _shown(layer: LayerProbe) -> tuple[tuple[dict[str, list[float]], float], ...]:
    return (layer.spectrum, SPECTRUM_SHARE), (layer.magnitude, MAGNITUDE_SHARE)


def _three(curves: dict[str, list[float]], share: float) -> str:
    return " / ".join(f"{100 * curves[name][SHARES.index(share)]:.1f}" for name in ("residual", "weight", "random"))


def _error_table(found: ProbeResult) -> Table:
    sizes = [size.bytes_ratio for size in found.verdict.sizes]
    table = Table(
        title="predicted squared error over weight energy, at a share of the experts' bytes, everything counted",
        title_justify="left",
    )
    table.add_column("coder")
    table.add_column("center")
    for ratio in sizes:
        table.add_column(f"{ratio:.1%}", justify="right")
    by_key = {(one.coder, one.center_bits, one.bytes_ratio): one for one in found.predictions}
    rows = sorted({(one.coder, one.center_bits) for one in found.predictions}, key=lambda row: (row[1] or 0, row[0]))
    for number, (name, bits) in enumerate(rows):
        if number and bits != rows[number - 1][1]:
            table.add_section()
        table.add_row(name, center_title(bits), *(_cell(by_key.get((name, bits, ratio))) for ratio in sizes))
    return table


def _cell(one: Prediction | None) -> str:
    return "-" if one is None else f"{one.error:.3g}\n{one.setting}"


def _answer(found: ProbeResult) -> list[str | Text]:
    lines: list[str | Text] = [Text.assemble("Does a center pay? ", (found.verdict.center_pays, "bold"))]
    if len(found.experts) < found.num_experts:
        lines.append(
            f"Sentences and errors are for all {found.num_experts} experts, extrapolated from {len(found.experts)}; "
            "the table's residuals are of the sample."
        )
    return [*lines, *found.verdict.sentences]


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
