"""``resmoe``: parse, call, print, exit code. Results on stdout, progress and errors on stderr."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args, get_origin

import click
from click.core import ParameterSource
from pydantic_core import PydanticUndefined
from rich.console import Console

from compress_tools.architectures.registry import find_architecture
from compress_tools.cli import tables
from compress_tools.config import CompressionConfig
from compress_tools.errors import ConfigError, ResMoEError
from compress_tools.evaluation.config import TasksConfig, TextConfig, make_tasks_config, make_text_config
from compress_tools.output.staging import log_path
from compress_tools.planner.config import PlannerConfig
from compress_tools.planner.request import Request, kept_plan_path, plan_for_output, planned_sizes, read_request
from compress_tools.probe.config import ProbeConfig
from compress_tools.probe.tables import probe_tables
from compress_tools.progress.listener import ProgressListener, Together
from compress_tools.progress.live import LiveProgress
from compress_tools.progress.log import logged
from compress_tools.report import CompressionReport
from compress_tools.slices.slices import Slice, make_slice, shards_of, slice_path
from compress_tools.source.reader import CheckpointReader
from compress_tools.version import __version__

# A pipe has no width of its own; 120 columns keep the tables whole in a log.
out = Console(width=None if sys.stdout.isatty() else 120)


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command one option for each field of ``CompressionConfig``: its default, type and help."""
    for name, field in reversed(CompressionConfig.model_fields.items()):
        choices = get_args(field.annotation) if get_origin(field.annotation) is not None else ()
        default = None if field.default is PydanticUndefined else field.default
        command = click.option(
            "--" + name.replace("_", "-"),
            name,
            type=click.Choice(choices) if choices else field.annotation,
            default=default,
            show_default=default is not None,
            help=field.description,
        )(command)
    return command


def probe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command one option for each field of ``ProbeConfig``; types and ranges are checked there."""
    for name, field in reversed(ProbeConfig.model_fields.items()):
        many = name == "bytes_ratio"
        default = field.default if isinstance(field.default, int | str) else None
        command = click.option(
            "--" + name.replace("_", "-"),
            name,
            type=float if many else str if field.annotation is str else int,
            multiple=many,
            default=default,
            show_default=default is not None,
            help=field.description,
        )(command)
    return command


def planner_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--plan`` and one option for each field of ``PlannerConfig``, which checks types and ranges."""
    for name, field in reversed(PlannerConfig.model_fields.items()):
        flag, given = field.annotation is bool, field.default not in (None, PydanticUndefined)
        default = f" [default: {field.default}]" if given and not flag else ""
        command = click.option(
            "--" + name.replace("_", "-"),
            name,
            default=None,
            help=field.description + default,
            is_flag=flag,
            type=bool if flag else int if isinstance(field.default, int) else str,
        )(command)
    return click.option("--plan", "plan_file", metavar="FILE", help="Store each layer as this plan says.")(command)


def evaluation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command one option for each field of ``TextConfig`` and ``TasksConfig``; ranges are checked there."""
    for name, field in reversed((TextConfig.model_fields | TasksConfig.model_fields).items()):
        kinds = get_args(field.annotation)
        choices = kinds if kinds and type(None) not in kinds else ()
        command = click.option(
            "--" + name.replace("_", "-"),
            name,
            type=click.Choice(choices) if choices else int if int in kinds else str,
            help=field.description + (f"  [default: {field.default}]" if isinstance(field.default, str) else ""),
        )(command)
    return command


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace DST and what an unfinished run left.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="resmoe")
def cli() -> None:
    """ResMoE: a center expert and compressed residuals in place of a Mixture-of-Experts model's experts.

    \b
    resmoe compress SRC DST && vllm serve DST
    """


@cli.command()
@click.argument("src")
@click.argument("dst")
@recipe_options
@planner_options
@click.option(
    "--shard", metavar="I/N", help="Make slice I of N, a directory beside DST; `resmoe merge DST` joins all of them."
)
@click.option("--dry-run", is_flag=True, help="Print sizes and peak memory; write nothing.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same source and recipe.")
@overwrite_option
@json_option
@click.pass_context
def compress(
    context: click.Context,
    src: str,
    dst: str,
    shard: str | None,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compress the MoE checkpoint SRC into the ResMoE checkpoint DST.

    \b
    One coder for all layers (--method ...), a byte budget that is spent where it pays
    (--target-bytes-ratio), or a plan from an earlier run or by hand (--plan).

    A log is kept in DST.log.
    """
    from compress_tools.pipeline import compress as run
    from compress_tools.pipeline import compress_slice

    request = _request(context, options)
    part = None if shard is None else make_slice(shard)
    _check_exclusive(resume, overwrite)
    if part is not None and request.budget is not None:
        raise ConfigError(
            "--shard needs a plan that all slices follow: `resmoe plan SRC --target-bytes-ratio ... --out plan.yaml`, "
            "then --plan plan.yaml with each slice"
        )
    if dry_run:
        _print_plan(src, request, None, as_json, part)
        return
    going = {"resume": resume, "overwrite": overwrite}
    if part is not None:
        with _progress(as_json, slice_path(dst, part)) as progress:
            path = compress_slice(src, dst, request.config, part, planned=request.planned, progress=progress, **going)
        _print(
            {"path": str(path), "slice": [part.number, part.count]},
            as_json,
            lambda: f"Written to {path}. Once all {part.count} are there: [bold]resmoe merge {dst}[/bold]",
        )
        return
    with _progress(as_json, dst) as progress:
        planned = request.planned
        if request.budget is not None:
            planned = plan_for_output(src, dst, request.config, request.budget, progress=progress, **going)
        report = run(src, dst, request.config, planned=planned, progress=progress, **going)
        if request.budget is not None:
            kept_plan_path(dst).unlink(missing_ok=True)
    print_report(report, dst, as_json)


@cli.command()
@click.argument("dst")
@click.argument("slices", nargs=-1)
@click.option("--remove-slices", is_flag=True, help="Remove the slices, shard by shard as they are taken.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted merge.")
@overwrite_option
@json_option
def merge(dst: str, slices: tuple[str, ...], remove_slices: bool, resume: bool, overwrite: bool, as_json: bool) -> None:
    """Join the SLICES of `resmoe compress SRC DST --shard I/N` into DST; by default those beside DST.

    On one file system shards are hard links: the slices cost no disk beside DST and may be removed.
    """
    from compress_tools.slices.merge import merge as run

    _check_exclusive(resume, overwrite)
    with _progress(as_json, dst) as progress:
        report = run(dst, slices, resume=resume, overwrite=overwrite, remove_slices=remove_slices, progress=progress)
    print_report(report, dst, as_json)


@cli.command()
@click.argument("src")
@recipe_options
@planner_options
@click.option("--out", metavar="FILE", help="Write the plan for --target-bytes-ratio; edit it, then pass it to --plan.")
@click.option("--overwrite", is_flag=True, help="Replace the file of --out.")
@json_option
@click.pass_context
def plan(context: click.Context, src: str, out: str | None, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Say what `resmoe compress SRC` would write: params, bytes, peak memory.

    Weights are read only with --target-bytes-ratio, which measures them; nothing is written but --out.
    """
    request = _request(context, options)
    _print_plan(src, request, out, as_json, overwrite=overwrite)


@cli.command("probe")
@click.argument("src")
@probe_options
@click.option("--picture", type=click.Path(dir_okay=False), metavar="FILE.png", help="Draw curves and errors.")
@json_option
def probe_command(src: str, picture: str | None, as_json: bool, **options: Any) -> None:
    """Is a center worth it? Measure sampled experts of the MoE checkpoint SRC, before compressing anything."""
    from compress_tools.probe.config import make_probe_config
    from compress_tools.probe.picture import check_picture_path, draw_probe
    from compress_tools.probe.probe import probe

    config = make_probe_config(**{name: value for name, value in options.items() if value is not None})
    if picture is not None:
        check_picture_path(picture)
    with _progress(as_json) as progress:
        found = probe(src, config, progress)
    if picture is not None:
        draw_probe(found, picture)
    _print(found.content(), as_json, lambda: probe_tables(found))


@cli.command("inspect")
@click.argument("path")
@json_option
def inspect_command(path: str, as_json: bool) -> None:
    """Describe the ResMoE checkpoint PATH: coding, bytes on disk and bytes resident, layer by layer."""
    from compress_tools.stored.inspection import inspect

    found = inspect(path)
    _print(asdict(found), as_json, lambda: tables.inspection_table(found))


@cli.command()
@click.argument("path")
@click.option("--against", metavar="SRC", help="The source: recompute the error, compare copied tensors.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Assignments in parallel.")
@json_option
def verify(path: str, against: str | None, workers: int, as_json: bool) -> None:
    """Check the ResMoE checkpoint PATH: every expert there, shapes, finiteness, masks, error."""
    from compress_tools.stored.verify import verify as run

    verdicts = run(path, against, workers)
    _print(
        {"ok": True, "layers": [asdict(verdict) for verdict in verdicts]},
        as_json,
        lambda: tables.verdict_table(verdicts),
    )


@cli.command("eval")
@click.argument("model")
@evaluation_options
@json_option
def eval_command(model: str, as_json: bool, **options: Any) -> None:
    """Perplexity of the checkpoint MODEL, dense or ResMoE, on a text, and its distance from the original; or tasks.

    \b
    resmoe eval DST --text heldout.txt --against SRC
    resmoe eval DST --tasks hellaswag,my_task --include-path my_tasks
    """
    from compress_tools.evaluation.perplexity import evaluate
    from compress_tools.evaluation.tasks import run_tasks

    given = {name: value for name, value in options.items() if value is not None}
    if ("text" in given) == ("tasks" in given):
        raise ConfigError("resmoe eval: give one of --text FILE (perplexity) and --tasks NAME[,NAME] (lm-eval)")
    kind, fields = ("--tasks", TasksConfig) if "tasks" in given else ("--text", TextConfig)
    if idle := [name for name in given if name not in fields.model_fields]:
        raise ConfigError(f"--{idle[0].replace('_', '-')} has no effect with {kind}")
    if "tasks" in given:
        found = run_tasks(model, make_tasks_config(**given))
        _print(found, as_json, lambda: tables.tasks_table(model, found))
        return
    config = make_text_config(**given)
    with _progress(as_json) as progress:
        result = evaluate(model, config, progress)
    _print(asdict(result), as_json, lambda: tables.evaluation_table(result))


@cli.command()
@click.argument("src")
@click.argument("dst")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same source.")
@overwrite_option
@json_option
def restore(src: str, dst: str, resume: bool, overwrite: bool, as_json: bool) -> None:
    """Write the dense Hugging Face checkpoint DST that the ResMoE checkpoint SRC stands for."""
    from compress_tools.stored.restore import restore as run

    _check_exclusive(resume, overwrite)
    with _progress(as_json, dst) as progress:
        total_bytes = run(src, dst, resume=resume, overwrite=overwrite, progress=progress)
    _print({"path": dst, "total_bytes": total_bytes}, as_json, lambda: f"Written to {dst}: {total_bytes} bytes.")


@cli.command()
@click.option("--out", "out_dir", default="demo-output", show_default=True, help="Directory of models and results.")
def demo(out_dir: str) -> None:
    """Train a small MoE, compress it twice, serve all three with vLLM, ask them, compare. Needs the repository."""
    try:
        from benchmarks.demo import run_demo
    except ModuleNotFoundError as err:
        if err.name and err.name.split(".")[0] != "benchmarks":
            raise
        raise ConfigError("resmoe demo needs the repository: clone it and run `make demo` there") from err
    run_demo(out_dir)


def main(command: click.Command = cli) -> None:
    """Run a command; its exit codes are STYLE's: 0 ok, 2 usage, 3 architecture, 4 checkpoint, 5 numerics, 1 bug."""
    try:
        command.main(standalone_mode=False)
    except click.exceptions.Abort:
        invoked = getattr(command, "commands", {}).get("".join(sys.argv[1:2]))
        resumes = invoked is not None and any(option.name == "resume" for option in invoked.params)
        advice = "; `--resume` goes on from the last whole shard" if resumes else ""
        print(f"resmoe: interrupted{advice}", file=sys.stderr)
        sys.exit(130)
    except click.ClickException as err:
        err.show()
        sys.exit(err.exit_code)
    except ResMoEError as err:
        print(f"resmoe: {err}", file=sys.stderr)
        sys.exit(err.exit_code)


def _request(context: click.Context, options: dict[str, Any]) -> Request:
    given = {name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    path = options.pop("plan_file")
    # A flag that is not given is no choice.
    budget = {name: options.pop(name) for name in PlannerConfig.model_fields}
    budget["uniform"] = budget["uniform"] or None
    return read_request(options, budget, path, given)


def _check_exclusive(resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; a resumed run replaces what it was told to")


@contextmanager
def _progress(quiet: bool, dst: str | Path | None = None) -> Iterator[ProgressListener]:
    """Bars on a terminal, lines where stderr is none, neither if quiet; and the log file of ``dst``."""
    live = not quiet and sys.stderr.isatty()
    with logged(None if dst is None else log_path(dst), to_stderr=not quiet and not live) as lines:
        if live:
            with LiveProgress() as bars:
                yield Together(bars, lines)
        else:
            yield lines


def _print(content: Any, as_json: bool, human: Callable[[], Any]) -> None:
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        out.print(human(), highlight=False)


def print_report(report: CompressionReport, dst: str, as_json: bool) -> None:
    """What a compression did, and what to do with it."""
    _print(report.content(), as_json, lambda: tables.report_table(report))
    if not as_json:
        family = find_architecture(CheckpointReader(dst).config)
        then = f"Next: [bold]vllm serve {dst}[/bold]" if family.vllm else f"{family.title} runs in {family.runs_in}."
        out.print(f"Written to {dst}. {then}", highlight=False)


def _print_plan(
    src: str, request: Request, out_file: str | None, as_json: bool, part: Slice | None = None, overwrite: bool = False
) -> None:
    """The whole plan; with ``part`` also what that slice makes of it."""
    with _progress(as_json or request.budget is None) as progress:
        made, planned = planned_sizes(src, request, out_file, progress, overwrite)
    content = made.summary() if planned is None else {**made.summary(), "plan": planned.resolved()}
    if part is not None:
        layers = [shard.layer for shard in shards_of(made, part) if shard.layer is not None]
        content |= {"slice": [part.number, part.count], "slice_layers": layers}
    _print(content, as_json, lambda: tables.plan_table(made))
    if as_json:
        return
    if request.budget is not None:
        out.print(tables.planned_table(planned.found, request.budget.optimize), highlight=False)
    if part is not None:
        out.print(f"Slice {part} makes layers {', '.join(map(str, layers))} of these.", highlight=False)
    if out_file is not None:
        out.print(
            f"Written to {out_file}. Next: [bold]resmoe compress {src} DST --plan {out_file}[/bold]", highlight=False
        )


if __name__ == "__main__":
    main()
