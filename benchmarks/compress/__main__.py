"""`python -m benchmarks.compress`: the engine on one layer at true shapes; the trellis encoder; and POT's own solver.

All of it takes one to two hours on 2 cores; `--shape` and `--kind` choose. Each layer runs in a process of its own,
so that its peak memory is its own.
"""

import json
import multiprocessing
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.compress import encoder
from benchmarks.compress.pot import CASES, Comparison, compare
from benchmarks.compress.run import STAGES, LayerRun, run_layer
from benchmarks.compress.source import KINDS, Kind, write_source
from benchmarks.harness.rows import Row, print_rows, write_rows
from benchmarks.harness.shapes import SHAPES
from compress_tools.config import default_workers

# The project's targets: minutes for near-copied and for unrelated experts, and peak memory in GB.
TARGETS = {
    "DeepSeekMoE-16B": (3, 10, 4),
    "Qwen3-30B-A3B": (3, 10, 4),
    "Mixtral-8x7B": (10, 60, 12),
}


@dataclass(frozen=True)
class Options:
    """The command's options."""

    shapes: tuple[str, ...]
    kinds: tuple[Kind, ...]
    with_layers: bool
    with_pot: bool
    with_encoder: bool
    with_trellis_layer: bool
    workers: int
    check_svd: bool | None
    work_dir: Path | None
    json_file: Path | None
    one: tuple[str, Kind] | None

    def checks_svd(self, shape: str) -> bool:
        """Whether expert 0's error is held against the exact tail; for Mixtral that takes too long to be the rule."""
        return shape != "Mixtral-8x7B" if self.check_svd is None else self.check_svd


def layer_rows(run: LayerRun) -> list[Row]:
    """One layer's figures: targets first, then each stage against its limit."""
    minutes_near, minutes_unrelated, peak_gb = TARGETS[run.shape]
    case = {"shape": run.shape, "kind": run.kind}
    stem = f"{run.shape}, {run.kind}"
    total = sum(run.seconds.values()) / 60
    target = minutes_near if run.kind == "near-copied" else minutes_unrelated
    rows = [
        Row.at_most(f"{stem}: alignment, center, both residuals, read and write", total, "min", target, **asdict(run)),
        Row.at_most(f"{stem}: peak memory", run.peak_gb, "GB", peak_gb, **case),
        Row.at_most(f"{stem}: relative duality gap", run.gap, "", 1e-6, **case),
    ]
    if run.excess is not None:
        rows.append(Row.at_most(f"{stem}: SVD error over the exact tail", 100 * run.excess, "%", 0.1, **case))
    for stage in STAGES:
        seconds, limit = run.seconds.get(stage, 0.0), run.limit_s.get(stage)
        beside = f" (limit {limit:.1f} s)" if limit is not None else ""
        rows.append(Row(f"  {stage}{beside}", seconds, "s", context={**case, "limit_s": limit}))
    return rows


def pot_rows(found: Comparison) -> list[Row]:
    """Ours against POT's, on one input."""
    stem = f"{found.experts} x {found.rows} x {found.columns}, {found.kind}"
    note = ", truncated" if found.pot_truncated else ""
    return [
        Row.at_most(
            f"{stem}: objective, share of POT's{note}", found.our_objective / found.pot_objective, "", 1 + 1e-6,
            **asdict(found),
        ),
        Row(f"{stem}: time, {found.our_s:.2f} s, POT {found.pot_s:.2f} s", found.pot_s / found.our_s, "x faster"),
    ]  # fmt: skip


@click.command()
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(TARGETS)), help="Default: all.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), help="Default: both.")
@click.option("--layers/--no-layers", "with_layers", default=True, show_default=True, help="Run the layers.")
@click.option("--pot/--no-pot", "with_pot", default=True, show_default=True, help="Compare with POT's own solver.")
@click.option(
    "--encoder/--no-encoder", "with_encoder", default=True, show_default=True, help="Speed of the trellis encoder."
)
@click.option(
    "--trellis-layer",
    "with_trellis_layer",
    is_flag=True,
    help=f"A whole layer of {encoder.LAYER_SHAPE} in trellis codes: minutes, and 2 GB of disk.",
)
@click.option("--workers", default=default_workers, type=click.IntRange(min=1), help="Default: the number of cores.")
@click.option("--check-svd/--no-check-svd", default=None, help="Exact tail of one expert. Default: not for Mixtral.")
@click.option("--work-dir", type=click.Path(path_type=Path, file_okay=False), help="Default: a temporary directory.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows to FILE.")
@click.option("--one", hidden=True, nargs=2, type=str, help="Run one shape and kind here; print JSON.")
def main(**options: Any) -> None:
    """Measure the compression engine."""
    chosen = Options(**options)
    if chosen.one:
        print(json.dumps(asdict(_measure(*chosen.one, chosen))))
        return
    rows: list[Row] = []
    if chosen.with_pot:
        for case in CASES:
            rows += pot_rows(compare(*case, workers=chosen.workers))
            click.echo(f"{rows[-2].name}: {rows[-2].value:.6f}; {rows[-1].name}", err=True)
    if chosen.with_encoder:
        rows += encoder.encoder_rows()
    if chosen.with_trellis_layer:
        rows += encoder.layer_rows(workers=chosen.workers)
    for name in (chosen.shapes or TARGETS) if chosen.with_layers else ():
        for kind in chosen.kinds or KINDS:
            rows += layer_rows(_in_a_process(name, kind, chosen))
            click.echo(f"{name}, {kind}: done", err=True)
            if chosen.json_file:
                write_rows(rows, chosen.json_file)
    print_rows(rows, "Compression of one layer")
    if chosen.json_file:
        write_rows(rows, chosen.json_file)


def _in_a_process(name: str, kind: Kind, options: Options) -> LayerRun:
    command = [sys.executable, "-m", "benchmarks.compress", "--one", name, kind, "--workers", str(options.workers)]
    command += ["--check-svd"] if options.checks_svd(name) else ["--no-check-svd"]
    command += ["--work-dir", str(options.work_dir)] if options.work_dir else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return LayerRun(**json.loads(done.stdout))


def _measure(name: str, kind: Kind, options: Options) -> LayerRun:
    if options.work_dir:
        options.work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work_dir) as scratch:
        source = Path(scratch) / "source"
        # In a process of its own: what making the weights takes is no part of the peak.
        making = multiprocessing.get_context("spawn").Process(target=write_source, args=(source, SHAPES[name], kind))
        making.start()
        making.join()
        if making.exitcode:
            raise SystemExit(making.exitcode)
        check_svd = options.checks_svd(name)
        return run_layer(source, Path(scratch), SHAPES[name], kind, options.workers, check_svd=check_svd)


if __name__ == "__main__":
    main()
