"""From the command's options to a plan: which options go together, and the plan kept beside an unfinished output."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress_tools.config import CompressionConfig, check_output_file, make_config
from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.format.shard_file import file_checksum
from compress_tools.output.run_identity import versions
from compress_tools.output.staging import destination, is_occupied, is_published, staging_path
from compress_tools.output.target import CompressionTarget, make_target
from compress_tools.planner.config import CENTER_FIELDS, CHOSEN_BY_PLANNER, PlannerConfig, make_planner_config
from compress_tools.planner.plan_file import PlanFile, parse_plan, read_plan
from compress_tools.planner.plan_text import plan_text
from compress_tools.planner.planner import find_plan
from compress_tools.progress.listener import ProgressListener
from compress_tools.source.moe_source import open_source
from compress_tools.source.reader import CheckpointReader


@dataclass(frozen=True)
class Request:
    """What a command line asks for: a uniform recipe, a budget to be planned for, or a plan.

    Attributes:
        config: the recipe; of a budget or a plan what concerns layers, centers and the machine.
        budget: to be planned for.
        planned: the plan given.
    """

    config: CompressionConfig
    budget: PlannerConfig | None = None
    planned: PlanFile | None = None


def read_request(
    recipe: Mapping[str, Any], budget: Mapping[str, Any], plan: str | None, given: Collection[str]
) -> Request:
    """Tell the three ways apart, and refuse options that would have no effect.

    Args:
        recipe: options of ``CompressionConfig``; None: not given.
        budget: options of ``PlannerConfig``; None: not given.
        plan: ``--plan``.
        given: names of the options that the user gave, defaults left out.
    Raises:
        ConfigError: names the option and the rule.
    """
    options = {name: value for name, value in recipe.items() if value is not None}
    if plan is not None:
        if budget["target_bytes_ratio"] is not None:
            raise ConfigError("--plan and --target-bytes-ratio exclude each other; a plan has its sizes")
        _refuse((*CHOSEN_BY_PLANNER, *CENTER_FIELDS, "layers", *budget), given, "with --plan; it is the plan's to say")
        machine = {name: options[name] for name in ("device", "workers") if name in options}
        return Request(make_config(**machine), planned=read_plan(plan))
    if budget["target_bytes_ratio"] is None:
        _refuse(budget, given, "without --target-bytes-ratio")
        config = make_config(**options)
        for name, why in config.without_effect().items():
            _refuse([name], given, f"with {why}")
        return Request(config)
    _refuse(CHOSEN_BY_PLANNER, given, "with --target-bytes-ratio, which chooses coders; --coders restricts the choice")
    chosen = {name: value for name, value in options.items() if name not in CHOSEN_BY_PLANNER}
    asked = {name: value for name, value in budget.items() if value is not None}
    return Request(make_config(**chosen), make_planner_config(**asked))


def _refuse(names: Collection[str], given: Collection[str], why: str) -> None:
    for name in names:
        if name in given:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect {why}")


def plan_for_budget(
    src: str | Path, config: CompressionConfig, budget: PlannerConfig, progress: ProgressListener | None = None
) -> PlanFile:
    """Plan for a budget.

    Args:
        src: source directory; only read.
        config: layers, how centers are found, device, workers.
        budget: what is asked.
        progress: told of layers and experts.
    Raises:
        ConfigError, UnsupportedArchitectureError, CheckpointError, NumericalError: see errors.py.
    """
    reader = CheckpointReader(src)
    planned = find_plan(reader, config, budget, progress)
    text = plan_text(planned, config, budget, Path(src).name, _digest(reader, config, budget))
    return replace(parse_plan(text, "the plan found"), found=planned)


def plan_for_output(
    src: str | Path,
    dst: str | Path,
    config: CompressionConfig,
    budget: PlannerConfig,
    *,
    resume: bool,
    overwrite: bool,
    progress: ProgressListener | None = None,
) -> PlanFile:
    """``plan_for_budget``, kept in ``DST.plan.yaml`` until ``DST`` is whole, so that a resumed run measures nothing.

    Raises:
        CheckpointError: ``dst`` could not be written, which is better known before the measuring.
    """
    target, kept = destination(dst), kept_plan_path(dst)
    unfinished = staging_path(target).exists()
    if is_occupied(target) and not overwrite and not unfinished and not is_published(target):
        raise CheckpointError(f"{target}: not empty; choose another directory or pass --overwrite")
    if unfinished and not resume and not overwrite:
        raise CheckpointError(f"{staging_path(target)}: left by an unfinished run; pass --resume or --overwrite")
    digest = _digest(CheckpointReader(src), config, budget)
    if resume and kept.is_file() and digest in (text := kept.read_text(encoding="utf-8")):
        return parse_plan(text, str(kept))
    planned = plan_for_budget(src, config, budget, progress)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(planned.text, encoding="utf-8")
    return planned


def planned_sizes(
    src: str | Path,
    request: Request,
    out: str | Path | None,
    progress: ProgressListener | None = None,
    overwrite: bool = False,
) -> tuple[CompressionTarget, PlanFile | None]:
    """What a request would write, and the plan behind it, if any; weights are read for a budget only.

    Args:
        src: source directory.
        request: what is asked.
        out: file to write the plan for a budget to.
        progress: told of layers and experts.
        overwrite: replace ``out``.
    Raises:
        ConfigError: there is no plan to write to ``out``, or no place; or the request does not fit the model.
    """
    if out is not None:
        if request.budget is None:
            raise ConfigError("--out has no effect without --target-bytes-ratio")
        check_output_file("--out", out)
        if Path(out).exists() and not overwrite:
            raise ConfigError(f"--out {out}: exists, perhaps edited; choose another name or pass --overwrite")
    planned = request.planned
    if request.budget is not None:
        planned = plan_for_budget(src, request.config, request.budget, progress)
    if out is not None and planned is not None:
        Path(out).write_text(planned.text, encoding="utf-8")
    reader = CheckpointReader(src)
    if planned is None:
        return make_target(reader, request.config), None
    config = planned.config(request.config.device, request.config.workers)
    return make_target(reader, config, planned.compressed(open_source(reader))), planned


def kept_plan_path(dst: str | Path) -> Path:
    """Where the plan of an unfinished output is kept: beside it."""
    path = destination(dst)
    return path.with_name(path.name + ".plan.yaml")


def _digest(reader: CheckpointReader, config: CompressionConfig, budget: PlannerConfig) -> str:
    """What determines a plan, in a few letters."""
    calibration = ""
    if budget.calibration is not None:
        try:
            calibration = file_checksum(Path(budget.calibration))
        except OSError as err:
            raise CheckpointError(f"--calibration {budget.calibration}: not readable: {err}") from err
    content = [reader.fingerprint(), config.recipe(), budget.model_dump(), calibration, versions()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
