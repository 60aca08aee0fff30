"""``resmoe``: parse, call, print, exit code. Results on stdout, progress and errors on stderr.

Nothing but click is imported before a command runs: `resmoe --help` answers at once.
"""

import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, NoReturn

import click

from compress_tools.cli.options import ConfigCommand
from compress_tools.damage import RUINED_ERROR
from compress_tools.errors import CheckpointError, ConfigError, ResMoEError
from compress_tools.text_file import in_words
from compress_tools.version import __version__

if TYPE_CHECKING:
    from pydantic import BaseModel

    from compress_tools.cli.request import Request
    from compress_tools.progress.listener import ProgressListener
    from compress_tools.slices.slices import Slice
    from compress_tools.source.files import CheckpointFiles

EXIT_CODES = """\b
Exit codes:
  0    done
  1    a fault of resmoe itself, with a traceback: please report it
  2    the request: an option, a plan, a combination
  3    the model's architecture is not known, or it is no MoE
  4    a checkpoint or file that can't be read or written
  5    weights or results that are not finite
  130  interrupted
"""


def recipe_configs() -> "Sequence[type[BaseModel]]":
    """What a uniform recipe is checked by."""
    from compress_tools.config import CompressionConfig

    return (CompressionConfig,)


def _request_configs() -> "Sequence[type[BaseModel]]":
    from compress_tools.planner.config import PlannerConfig

    return (*recipe_configs(), PlannerConfig)


def _probe_configs() -> "Sequence[type[BaseModel]]":
    from compress_tools.probe.config import ProbeConfig

    return (ProbeConfig,)


def _evaluation_configs() -> "Sequence[type[BaseModel]]":
    from compress_tools.evaluation.config import TasksConfig, TextConfig

    return TextConfig, TasksConfig


def _calibration_configs() -> "Sequence[type[BaseModel]]":
    from compress_tools.calibration.config import CalibrationConfig

    return (CalibrationConfig,)


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
revision_option = click.option(
    "--revision", metavar="REV", help="Branch, tag or commit of a model of the hub.  [default: main]"
)
stream_option = click.option(
    "--stream",
    is_flag=True,
    help="Never hold all of a model of the hub: fetch its weight files as layers need them, and remove them after.",
)
plan_option = click.option("--plan", "plan_file", metavar="FILE", help="Store each layer as this plan says.")
force_option = click.option(
    "--force",
    is_flag=True,
    help=f"Write a result whose error says that the model is ruined (mean relative error above {RUINED_ERROR}).",
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace DST and what an unfinished run left.")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=EXIT_CODES,
)
@click.version_option(__version__, prog_name="resmoe")
def cli() -> None:
    """ResMoE: a center expert and compressed residuals in place of a Mixture-of-Experts model's experts.

    \b
    resmoe compress SRC DST && vllm serve DST
    """  # noqa: D301 - click's mark of lines to keep


@cli.command(cls=ConfigCommand, configs=_request_configs)
@click.argument("src")
@click.argument("dst")
@plan_option
@click.option(
    "--shard", metavar="I/N", help="Make slice I of N, a directory beside DST; `resmoe merge DST` joins all of them."
)
@click.option("--dry-run", is_flag=True, help="Print sizes and peak memory; write nothing.")
@revision_option
@stream_option
@click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same source and recipe.")
@overwrite_option
@force_option
@json_option
def compress(  # noqa: PLR0913 - click hands over each option by its name
    *,
    src: str,
    dst: str,
    plan_file: str | None,
    shard: str | None,
    dry_run: bool,
    revision: str | None,
    stream: bool,
    resume: bool,
    overwrite: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compress the MoE checkpoint SRC, a directory or ORG/NAME of the hub, into the ResMoE checkpoint DST.

    \b
    By default a quarter of the experts' bytes is spent where it loses least. Or another budget
    (--target-bytes-ratio, --target-size), a plan from an earlier run or by hand (--plan), or
    one coder for all layers (--method; the paper's is --method prune).

    A log is kept in DST.log.
    """  # noqa: D301 - click's mark of lines to keep
    from compress_tools.cli.printing import (
        print_for_people,
        print_report,
        print_result,
        progress_on_stderr,
        with_command,
    )
    from compress_tools.cli.request import BUDGETS, check_prediction, kept_plan_path, plan_for_output, read_request
    from compress_tools.cli.sources import opened_source
    from compress_tools.kv_cache import cache_text
    from compress_tools.pipeline import compress as run
    from compress_tools.pipeline import compress_slice
    from compress_tools.slices.slices import make_slice, slice_path
    from compress_tools.source.reader import CheckpointReader

    request = read_request(given(options), plan_file)
    part = None if shard is None else make_slice(shard)
    most_error = inf if force else RUINED_ERROR
    _check_exclusive(resume=resume, overwrite=overwrite)
    if part is not None and request.budget is not None:
        asked = "" if BUDGETS.isdisjoint(given(options)) else "--target-bytes-ratio ... "
        raise ConfigError(
            f"--shard needs a plan that all slices follow: `resmoe plan SRC {asked}--out plan.yaml`, then "
            "--plan plan.yaml with each slice; or one --method for all layers"
        )
    if dry_run:
        _print_plan(src, request, partial(opened_source, src, revision, stream=stream), as_json=as_json, part=part)
        return
    if part is not None:
        beside = slice_path(dst, part)
        with (
            progress_on_stderr(quiet=as_json, dst=beside) as progress,
            opened_source(src, revision, progress, stream=stream, dst=beside) as source,
        ):
            path = compress_slice(
                source,
                dst,
                request.config,
                part,
                planned=request.planned,
                progress=progress,
                resume=resume,
                overwrite=overwrite,
                most_error=most_error,
            )
        print_result(
            {"path": str(path), "slice": [part.number, part.count]},
            lambda: with_command(f"Written to {path}. Once all {part.count} are there:", "resmoe", "merge", dst),
            as_json=as_json,
        )
        return
    with (
        progress_on_stderr(quiet=as_json, dst=dst) as progress,
        opened_source(src, revision, progress, stream=stream, dst=dst) as source,
    ):
        planned = request.planned
        if request.budget is not None:
            planned = plan_for_output(
                source, dst, request.config, request.budget, resume=resume, overwrite=overwrite, progress=progress
            )
            check_prediction(planned, request.budget, dst, most_error)
        report = run(
            source,
            dst,
            request.config,
            planned=planned,
            progress=progress,
            resume=resume,
            overwrite=overwrite,
            most_error=most_error,
        )
        if request.budget is not None:
            kept_plan_path(dst).unlink(missing_ok=True)
    print_report(report, dst, as_json=as_json)
    if request.asks_for_a_size and not as_json:
        stored = report.expert_bytes_after + report.other_after
        print_for_people(cache_text(CheckpointReader(dst).config, stored))


@cli.command()
@click.argument("dst")
@click.argument("slices", nargs=-1)
@click.option("--remove-slices", is_flag=True, help="Remove the slices, shard by shard as they are taken.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted merge.")
@overwrite_option
@force_option
@json_option
def merge(
    *,
    dst: str,
    slices: tuple[str, ...],
    remove_slices: bool,
    resume: bool,
    overwrite: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Join the SLICES of `resmoe compress SRC DST --shard I/N` into DST; by default those beside DST.

    On one file system shards are hard links: the slices cost no disk beside DST and may be removed.
    """
    from compress_tools.cli.printing import print_report, progress_on_stderr
    from compress_tools.slices.merge import merge as run

    _check_exclusive(resume=resume, overwrite=overwrite)
    with progress_on_stderr(quiet=as_json, dst=dst) as progress:
        report = run(
            dst,
            slices,
            resume=resume,
            overwrite=overwrite,
            remove_slices=remove_slices,
            most_error=inf if force else RUINED_ERROR,
            progress=progress,
        )
    print_report(report, dst, as_json=as_json)


@cli.command(cls=ConfigCommand, configs=_request_configs)
@click.argument("src")
@plan_option
@click.option("--out", metavar="FILE", help="Write the plan for a byte budget; edit it, then pass it to --plan.")
@click.option("--overwrite", is_flag=True, help="Replace the file of --out.")
@revision_option
@stream_option
@json_option
def plan(
    *,
    src: str,
    plan_file: str | None,
    out: str | None,
    overwrite: bool,
    revision: str | None,
    stream: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Say what `resmoe compress SRC DST` would write with the same options: params, bytes, peak memory.

    A byte budget, which is the default, is planned for: every layer is read and measured. With --method or --plan no
    weights are read. Nothing is written but --out.
    """
    from compress_tools.cli.request import read_request
    from compress_tools.cli.sources import opened_source

    request, opened = read_request(given(options), plan_file), partial(opened_source, src, revision, stream=stream)
    _print_plan(src, request, opened, out, as_json=as_json, overwrite=overwrite)


@cli.command(cls=ConfigCommand, configs=_probe_configs)
@click.argument("src")
@click.option("--picture", metavar="FILE.png", help="Draw curves and errors.")
@revision_option
@json_option
def probe(*, src: str, picture: str | None, revision: str | None, as_json: bool, **options: Any) -> None:
    """Is a center worth it? Measure sampled experts of the MoE checkpoint SRC, before compressing anything."""
    from compress_tools.cli.printing import print_result, progress_on_stderr
    from compress_tools.cli.sources import opened_source
    from compress_tools.probe.config import make_probe_config
    from compress_tools.probe.probe import probe as run
    from compress_tools.probe.tables import probe_tables

    config = make_probe_config(**given(options))
    if picture is not None:
        from compress_tools.probe.picture import check_picture_path, draw_probe

        check_picture_path(picture)
    with progress_on_stderr(quiet=as_json) as progress, opened_source(src, revision, progress) as source:
        found = run(source, config, progress)
    if picture is not None:
        draw_probe(found, picture)
    print_result(found.content(), lambda: probe_tables(found), as_json=as_json)


@cli.command(cls=ConfigCommand, configs=_calibration_configs)
@click.argument("src")
@click.option("--out", metavar="FILE", required=True, help="Write what was measured; pass it to --calibration.")
@click.option("--overwrite", is_flag=True, help="Replace the file of --out.")
@revision_option
@stream_option
@json_option
def calibrate(
    *, src: str, out: str, overwrite: bool, revision: str | None, stream: bool, as_json: bool, **options: Any
) -> None:
    """Measure on a text what errors of the MoE checkpoint SRC's weights count, for --calibration of compress and plan.

    \b
    resmoe calibrate SRC --out calibration.safetensors --text calibration.txt
    resmoe compress SRC DST --target-bytes-ratio 0.25 --calibration calibration.safetensors

    The model runs one decoder layer at a time, in transformers: memory holds a layer, the embeddings and the text's
    activations.
    """  # noqa: D301 - click's mark of lines to keep
    from compress_tools.calibration.calibrate import calibrate as run
    from compress_tools.calibration.config import make_calibration_config
    from compress_tools.cli.printing import print_result, progress_on_stderr
    from compress_tools.cli.sources import opened_source
    from compress_tools.cli.tables import calibration_lines

    config = make_calibration_config(**given(options))
    with (
        progress_on_stderr(quiet=as_json) as progress,
        opened_source(src, revision, progress, stream=stream) as source,
    ):
        found = run(source, out, config, progress, overwrite=overwrite)
    print_result(asdict(found), lambda: calibration_lines(found), as_json=as_json)


@cli.command()
@click.argument("path")
@json_option
def inspect(*, path: str, as_json: bool) -> None:
    """Describe the ResMoE checkpoint PATH: coding, bytes on disk and bytes resident, layer by layer."""
    from compress_tools.cli.printing import print_result
    from compress_tools.cli.tables import inspection_table
    from compress_tools.stored.inspection import inspect as run

    found = run(path)
    print_result(asdict(found), lambda: inspection_table(found), as_json=as_json)


@cli.command()
@click.argument("path")
@click.option("--against", metavar="SRC", help="The source: recompute the error, account for each tensor and file.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Assignments in parallel.")
@revision_option
@stream_option
@json_option
def verify(*, path: str, against: str | None, workers: int, revision: str | None, stream: bool, as_json: bool) -> None:
    """Check the ResMoE checkpoint PATH: every expert there, shapes, finiteness, masks, error."""
    from compress_tools.cli.printing import print_for_people, print_result, progress_on_stderr
    from compress_tools.cli.sources import opened_source
    from compress_tools.cli.tables import census_line, verdict_table
    from compress_tools.stored.verify import verification

    with progress_on_stderr(quiet=as_json) as progress:
        if against is None:
            if stream or revision is not None:
                raise ConfigError(f"{'--stream' if stream else '--revision'} has no effect without --against ORG/NAME")
            found = verification(path, None, workers, progress)
        else:
            with opened_source(against, revision, progress, stream=stream) as source:
                found = verification(path, source, workers, progress)
    print_result({"ok": True, **asdict(found)}, lambda: verdict_table(found), as_json=as_json)
    if found.census is not None and not as_json:
        print_for_people(census_line(found.census))


@cli.command("eval", cls=ConfigCommand, configs=_evaluation_configs)
@click.argument("model")
@json_option
def evaluate(*, model: str, as_json: bool, **options: Any) -> None:
    """Perplexity of the checkpoint MODEL, dense or ResMoE, on a text, and its distance from the original; or tasks.

    \b
    resmoe eval DST --text heldout.txt --against SRC
    resmoe eval DST --tasks hellaswag,my_task --include-path my_tasks
    """  # noqa: D301 - click's mark of lines to keep
    from compress_tools.cli.printing import print_result, progress_on_stderr
    from compress_tools.cli.tables import evaluation_table, tasks_table
    from compress_tools.evaluation.config import make_tasks_config, make_text_config, one_kind

    asked = given(options)
    if one_kind(asked) == "tasks":
        from compress_tools.evaluation.tasks import run_tasks

        found = run_tasks(model, make_tasks_config(**asked))
        print_result(found, lambda: tasks_table(model, found), as_json=as_json)
        return
    from compress_tools.evaluation.perplexity import evaluate as run

    config = make_text_config(**asked)
    with progress_on_stderr(quiet=as_json) as progress:
        result = run(model, config, progress)
    print_result(asdict(result), lambda: evaluation_table(result), as_json=as_json)


@cli.command()
@click.argument("src")
@click.argument("dst")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same source.")
@overwrite_option
@json_option
def restore(*, src: str, dst: str, resume: bool, overwrite: bool, as_json: bool) -> None:
    """Write the dense Hugging Face checkpoint DST that the ResMoE checkpoint SRC stands for."""
    from compress_tools.cli.printing import print_result, progress_on_stderr
    from compress_tools.stored.restore import restore as run

    _check_exclusive(resume=resume, overwrite=overwrite)
    with progress_on_stderr(quiet=as_json, dst=dst) as progress:
        total_bytes = run(src, dst, resume=resume, overwrite=overwrite, progress=progress)
    print_result(
        {"path": dst, "total_bytes": total_bytes},
        lambda: f"Written to {dst}: {total_bytes} bytes.",
        as_json=as_json,
    )


@cli.command()
@click.option("--out", "out_dir", default="demo-output", show_default=True, help="Directory of models and results.")
def demo(*, out_dir: str) -> None:
    """Train a small MoE, compress it three times, serve all four with vLLM, ask them, compare. Needs the repository."""
    try:
        from benchmarks.demo import run_demo
    except ModuleNotFoundError as err:
        if err.name and err.name.split(".")[0] != "benchmarks":
            raise
        raise ConfigError("resmoe demo needs the repository: clone it and run `make demo` there") from err
    run_demo(out_dir)


# Packages that are imported where they are needed, and the extra that brings each.
EXTRAS = {
    **dict.fromkeys(("click", "lap", "ot", "yaml", "rich", "threadpoolctl", "transformers"), "compress"),
    "matplotlib": "plot",
    **dict.fromkeys(("gguf", "openai", "psutil", "tokenizers"), "demo"),
    "ray": "ray",
    "lm_eval": "eval",
}


def main(command: click.Command = cli) -> None:
    """Run a command and end the process with one of ``EXIT_CODES``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file's name may hold bytes that are no text.
            stream.reconfigure(errors="backslashreplace")
    try:
        _run(command)
    except ResMoEError as err:
        print(f"resmoe: {err}", file=sys.stderr)
        sys.exit(err.exit_code)
    except ModuleNotFoundError as err:
        if (extra := EXTRAS.get((err.name or "").split(".")[0])) is None:
            _end_as_fault(err)
        print(f"resmoe: the package {err.name} is missing: pip install 'resmoe[{extra}]'", file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    except OSError as err:
        if err.filename is None:
            _end_as_fault(err)
        print(f"resmoe: {err.filename}: {in_words(err)}; make it accessible, or choose another", file=sys.stderr)
        sys.exit(CheckpointError.exit_code)
    except Exception as err:
        _end_as_fault(err)


def _run(command: click.Command) -> None:
    try:
        command.main(standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Abort:
        invoked = getattr(command, "commands", {}).get("".join(sys.argv[1:2]))
        resumes = invoked is not None and any(option.name == "resume" for option in invoked.params)
        advice = "; `--resume` goes on from the last whole shard" if resumes else ""
        print(f"resmoe: interrupted{advice}", file=sys.stderr)
        sys.exit(130)
    except click.ClickException as err:
        err.show()
        sys.exit(err.exit_code)
    except BrokenPipeError:
        # Whoever read the result has what they wanted, as in `resmoe inspect DST | head`; nothing more is flushed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _end_as_fault(err: Exception) -> NoReturn:
    traceback.print_exception(err)
    print(f"resmoe: {type(err).__name__}: a fault of resmoe itself; please report the lines above", file=sys.stderr)
    sys.exit(ResMoEError.exit_code)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user gave, of those that ``ConfigCommand`` made."""
    return {name: value for name, value in options.items() if value not in (None, ())}


def _check_exclusive(*, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; a resumed run replaces what it was told to")


def _print_plan(
    src: str,
    request: "Request",
    opened: "Callable[[ProgressListener], AbstractContextManager[str | CheckpointFiles]]",
    out_file: str | None = None,
    *,
    as_json: bool,
    part: "Slice | None" = None,
    overwrite: bool = False,
) -> None:
    """The whole plan; ``opened`` is the source ``src``, with ``part`` also what that slice makes of it."""
    from compress_tools.cli.printing import loud, print_for_people, print_result, progress_on_stderr, with_command
    from compress_tools.cli.request import planned_sizes, prediction_warning
    from compress_tools.cli.tables import plan_table, planned_table
    from compress_tools.kv_cache import cache_text
    from compress_tools.slices.slices import shards_of

    with (
        progress_on_stderr(quiet=as_json or request.budget is None) as progress,
        opened(progress) as source,
    ):
        made, planned = planned_sizes(source, request, out_file, progress, overwrite=overwrite)
    remarks = made.remarks()
    content = {**made.summary(), "remarks": remarks} | ({} if planned is None else {"plan": planned.resolved()})
    warning = None if planned is None or request.budget is None else prediction_warning(planned, request.budget)
    content |= {} if warning is None else {"warning": warning}
    layers: list[int] = []
    if part is not None:
        layers = [shard.layer for shard in shards_of(made, part) if shard.layer is not None]
        content |= {"slice": [part.number, part.count], "slice_layers": layers}
    print_result(content, lambda: plan_table(made), as_json=as_json)
    if as_json:
        return
    print_for_people(*remarks)
    if request.budget is not None and planned is not None and planned.found is not None:
        print_for_people(planned_table(planned.found, request.budget.optimize))
    if request.asks_for_a_size:
        print_for_people(cache_text(made.source.reader.config, made.summary()["total_bytes"]["after"]))
    if warning is not None:
        print_for_people(loud(warning))
    if part is not None:
        print_for_people(f"Slice {part} makes layers {', '.join(map(str, layers))} of these.")
    if out_file is not None:
        origin = made.source.reader.store.origin
        pinned = ("--revision", origin["commit"]) if origin else ()
        calibration = request.config.calibration
        counted = () if calibration is None else ("--calibration", calibration)
        compress_it = ("resmoe", "compress", src, "DST", "--plan", out_file, *counted, *pinned)
        print_for_people(with_command(f"Written to {out_file}. Next:", *compress_it))


if __name__ == "__main__":
    main()
