"""`python -m benchmarks.quality`: perplexity, KL and error of every method at equal bytes, on models trained here.

The models are loaded once, in fp32; each method's experts, compressed by `resmoe compress`'s own code and restored
from what it wrote, are put in the original's place. Merging with M-SMoE is the one method that sees data.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.harness.rows import Row, print_rows, write_rows
from benchmarks.models.prepared import ensure_reference_model
from benchmarks.models.reference_models import preset_config
from benchmarks.quality.compare import (
    Measured,
    bytes_section,
    calibration_section,
    experts_section,
    layers_section,
    original,
    paper_section,
)
from benchmarks.quality.picture import draw
from benchmarks.quality.subject import Subject
from benchmarks.quality.tables import print_section
from benchmarks.quality.verdicts import verdicts
from compress_tools.errors import ResMoEError

PRESETS = {"upcycled": "quality-upcycled", "scratch": "quality-scratch", "merged": "quality-merged"}
SECTIONS = ("paper", "bytes", "calibration", "layers", "experts")
RATIOS = (0.1, 0.15, 0.2, 0.25, 0.32, 0.45)
EXPERTS_RATIO = 0.25


@dataclass(frozen=True)
class Options:
    """The command's options."""

    models: tuple[Path, ...]
    cache: Path
    sections: tuple[str, ...]
    ratios: tuple[float, ...]
    tokens: int
    window: int
    stride: int | None
    json_file: Path | None
    picture: Path | None

    def check(self) -> None:
        """Refuse what would fail only after hours.

        Raises:
            UsageError: names the option.
        """
        if self.picture is not None and self.picture.suffix.lower() != ".png":
            raise click.UsageError(f"--picture {self.picture}: a PNG is written; end the name in .png")
        if self.picture is not None and "bytes" not in (self.sections or SECTIONS):
            raise click.UsageError("--picture draws the section bytes; ask for it too")
        if len({path.resolve().name for path in self.models}) != len(self.models):
            raise click.UsageError("--model: two folders of one name; rows are told apart by it")

    def labelled_models(self, console: Console) -> dict[str, Path]:
        """The asked models by their folders' names, or the presets', trained where they are not there yet."""
        if self.models:
            return {path.resolve().name: path for path in self.models}
        labelled = {label: self.cache / label for label in PRESETS}
        for label, preset in PRESETS.items():
            ensure_reference_model(preset_config(preset), labelled[label], console)
        return labelled

    def setup(self) -> dict[str, Any]:
        """How every figure was taken."""
        stride = min(self.stride or self.window, self.window - 1)
        return {"tokens": self.tokens, "window": self.window, "stride": stride, "arithmetic": "float32"}


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A model of `benchmarks.models.reference_models`; may be given more than once. [default: train all three]",
)
@click.option(
    "--cache",
    default="quality-models",
    show_default=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where the default models are trained to, once.",
)
@click.option("--section", "sections", multiple=True, type=click.Choice(SECTIONS), help="[default: all]")
@click.option(
    "--ratio",
    "ratios",
    multiple=True,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=RATIOS,
    show_default=True,
    help="Sizes, as shares of the experts' bytes.",
)
@click.option(
    "--tokens", default=16_384, show_default=True, type=click.IntRange(min=64), help="Held-out tokens scored."
)
@click.option("--window", default=256, show_default=True, type=click.IntRange(min=2), help="Tokens seen at once.")
@click.option("--stride", type=click.IntRange(min=1), help="From one window to the next. [default: the window]")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the rows.")
@click.option("--picture", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw perplexity against bytes.")
def main(**options: Any) -> None:
    """Compare methods on reference models: error, perplexity, KL and top-1 agreement at equal bytes."""
    chosen = Options(**options)
    console = Console(stderr=True)
    chosen.check()
    measured: list[Measured] = []
    rows: list[Row] = []
    try:
        for label, path in chosen.labelled_models(console).items():
            subject = Subject(path, chosen.tokens, chosen.window, chosen.stride or chosen.window)
            found = measure(subject, label, chosen.sections or SECTIONS, sorted(chosen.ratios), console)
            measured += found
            rows += verdicts(label, subject.residual_energy_share, found)
    except ResMoEError as err:
        raise click.ClickException(str(err)) from err
    setup = chosen.setup()
    for section in chosen.sections or SECTIONS:
        print_section(section, measured, setup)
    print_rows(rows, "Figures with a target")
    if chosen.json_file:
        labels = tuple({f"{one.model.partition(',')[0]}: " for one in measured})
        every = [*(one.row(setup) for one in measured), *rows]
        # Models may be measured one by one into one file.
        write_rows(every, chosen.json_file, keep=lambda name: not name.startswith(labels))
    if chosen.picture:
        draw(measured, chosen.picture)


def measure(
    subject: Subject, label: str, sections: tuple[str, ...], ratios: list[float], console: Console
) -> list[Measured]:
    """All asked sections of one model, the original first."""

    def say(text: str) -> None:
        console.print(text, highlight=False)

    found = [original(subject, label)]
    say(f"{label}: original: perplexity {found[0].perplexity:.4g}, residuals hold {subject.residual_energy_share:.1%}")
    if "paper" in sections:
        found += paper_section(subject, label, say)
    if "bytes" in sections:
        found += bytes_section(subject, label, ratios, say)
    if "calibration" in sections:
        found += calibration_section(subject, label, ratios, say)
    if "layers" in sections:
        found += layers_section(subject, label, say)
    if "experts" in sections:
        found += experts_section(subject, label, EXPERTS_RATIO, say)
    return found


if __name__ == "__main__":
    main()
