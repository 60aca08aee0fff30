"""From the command's options to a plan: which options go together, and the plan kept beside an unfinished output."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from compress_tools.config import CompressionConfig, Method, make_config
from compress_tools.damage import damage_warning, mean, refusal
from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.importance import is_calibration
from compress_tools.output.output_file import check_output_file, write_output_file
from compress_tools.output.staging import Staging
from compress_tools.output.target import CompressionTarget, make_target
from compress_tools.planner.budget import plan_for_budget, request_digest
from compress_tools.planner.config import (
    CENTER_FIELDS,
    CHOSEN_BY_PLANNER,
    DEFAULT_BYTES_RATIO,
    PlannerConfig,
    default_budget,
    make_planner_config,
)
from compress_tools.planner.plan_file import PlanFile, parse_plan, read_plan
from compress_tools.planner.plan_text import predicted_errors
from compress_tools.progress.listener import ProgressListener
from compress_tools.report import PLAN_NAME
from compress_tools.source.files import CheckpointFiles
from compress_tools.source.moe_source import open_source
from compress_tools.source.source_reader import SourceReader
from compress_tools.text_file import in_words, read_text

# Options that ask for a plan.
BUDGETS = frozenset({"target_bytes_ratio", "target_size"})


@dataclass(frozen=True)
class Request:
    """What a command line asks for: a uniform recipe, a budget to be planned for (the default), or a plan.

    Attributes:
        config: the recipe; of a budget or a plan what concerns layers, centers and the machine.
        budget: to be planned for.
        planned: the plan given.
    """

    config: CompressionConfig
    budget: PlannerConfig | None = None
    planned: PlanFile | None = None

    @property
    def asks_for_a_size(self) -> bool:
        """All weight files are to fit somewhere."""
        return self.budget is not None and self.budget.target_size is not None


def read_request(given: Mapping[str, Any], plan: str | None) -> Request:
    """Tell the three ways apart, and refuse options that would have no effect.

    Args:
        given: fields of ``CompressionConfig`` and ``PlannerConfig`` that the user gave, defaults left out.
        plan: ``--plan``.
    Raises:
        ConfigError: names the option and the rule.
    """
    budget = {name: value for name, value in given.items() if name in PlannerConfig.model_fields}
    recipe = {name: value for name, value in given.items() if name not in budget}
    calibration = given.get("calibration")
    if calibration is not None and (plan is not None or "method" in recipe):
        # A plan's coders, or the method's, use it; a file of layers' inputs is for planning alone.
        recipe["calibration"] = budget.pop("calibration")
    elif calibration is not None and is_calibration(calibration):
        recipe["calibration"] = calibration
    if plan is not None:
        if asked := BUDGETS & set(budget):
            raise ConfigError(f"--plan and {_option(min(asked))} exclude each other; a plan has its sizes")
        of_plan = (*CHOSEN_BY_PLANNER, *CENTER_FIELDS, "layers", *budget)
        _refuse(of_plan, given, "with --plan; it is the plan's to say")
        config, planned = make_config(**recipe), read_plan(plan)
        # Of the rest a plan says what goes unless the command line does.
        if "rest_bits" in given:
            planned = replace(planned, rest_bits=config.rest_bits)
        return Request(config, planned=planned)
    if asked := BUDGETS & set(budget):
        why = f"with {_option(min(asked))}, which chooses coders; --coders restricts the choice"
        _refuse(CHOSEN_BY_PLANNER, given, why)
        return Request(make_config(**recipe), make_planner_config(**budget))
    if "method" not in recipe:
        if orphans := [name for name in CHOSEN_BY_PLANNER if name in recipe]:
            raise ConfigError(_needs_method(orphans[0], recipe))
        config = make_config(**recipe)
        return Request(config, default_budget(config.layers, budget))
    _refuse(budget, given, "with --method, which is one coder at its own size; leave --method out to plan for a budget")
    config = make_config(**recipe)
    for name, why in config.without_effect().items():
        _refuse([name], given, f"with {why}")
    return Request(config)


def _needs_method(name: str, recipe: Mapping[str, Any]) -> str:
    """Why an option of a coder says nothing by itself, and the methods that take it together with the others given."""
    fitting = []
    for method in get_args(Method):
        try:
            config = make_config(**recipe, method=method)
        except ConfigError:
            continue
        if not config.without_effect().keys() & recipe.keys():
            fitting.append(method)
    methods = f" {' or '.join(fitting)}" if fitting else ""
    return (
        f"{_option(name)} needs --method{methods}; without a method the planner chooses coders and their settings, "
        f"for --target-bytes-ratio {DEFAULT_BYTES_RATIO} or the budget you name"
    )


def _refuse(names: Collection[str], given: Collection[str], why: str) -> None:
    for name in names:
        if name in given:
            raise ConfigError(f"{_option(name)} has no effect {why}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def plan_for_output(
    src: str | Path | CheckpointFiles,
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
        ConfigError: ``dst`` is the source, or within it.
        CheckpointError: ``dst`` could not be written, which is better known before the measuring; or it is finished
            and was planned for something else.
    """
    output, kept, reader = Staging(dst), kept_plan_path(dst), SourceReader(src)
    output.check_apart(reader.path)
    output.check_free(resume=resume, overwrite=overwrite)
    finished = resume and output.is_finished
    if finished:
        kept = output.dst / PLAN_NAME
    if resume and reader.store.origin:
        # The hub's model may have changed since, and measuring another one first would take hours.
        output.check_begun_from(reader.fingerprint())
    digest = request_digest(reader, config, budget)
    if resume and kept.is_file() and (plan := parse_plan(read_text(kept), str(kept))).request == digest:
        return plan
    if finished:
        raise CheckpointError(
            f"{output.dst}: is finished, and was not planned for this budget, from this source, by these versions; "
            "choose another directory, or pass --overwrite to replace it"
        )
    _keep("", kept)  # measuring may take hours: a place that can't be written is better known before
    kept.unlink()
    planned = plan_for_budget(src, config, budget, progress)
    _keep(planned.text, kept)
    return planned


def _keep(text: str, file: Path) -> None:
    """Write a plan by a rename, so that a killed run leaves none or all of it."""
    unfinished = file.with_name(file.name + ".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(file)
    except OSError as err:
        raise CheckpointError(f"{file}: the plan can't be kept: {in_words(err)}; make room, or choose another") from err


def check_prediction(planned: PlanFile, budget: PlannerConfig, dst: str | Path, most_error: float) -> None:
    """Refuse a plan that will ruin the model, before hours of compressing.

    Raises:
        ConfigError: the mean relative error that is predicted is above ``most_error``.
    """
    errors = _predicted_errors(planned, budget)
    if errors and mean(errors) > most_error:
        kept = f"the same command with --resume --force takes the plan that is kept in {kept_plan_path(dst)}"
        raise refusal(mean(errors), "is predicted", kept)


def prediction_warning(planned: PlanFile, budget: PlannerConfig) -> str | None:
    """``damage_warning`` of what a plan predicts."""
    return damage_warning(_predicted_errors(planned, budget))


def _predicted_errors(planned: PlanFile, budget: PlannerConfig) -> dict[int, float]:
    """Relative errors of the compressed layers; none where the objective is another."""
    return predicted_errors(planned.text) if budget.optimize == "error" else {}


def planned_sizes(
    src: str | Path | CheckpointFiles,
    request: Request,
    out: str | Path | None,
    progress: ProgressListener | None = None,
    *,
    overwrite: bool = False,
) -> tuple[CompressionTarget, PlanFile | None]:
    """What a request would write, and the plan behind it, if any; weights are read for a budget only.

    Args:
        src: source directory, or a model of the hub.
        request: what is asked.
        out: file to write the plan for a budget to.
        progress: told of layers and experts.
        overwrite: replace ``out``.
    Raises:
        ConfigError: there is no plan to write to ``out``, or no place; or the request does not fit the model.
    """
    if out is not None:
        if request.budget is None:
            given = "--plan" if request.planned is not None else "--method"
            raise ConfigError(f"--out has no effect with {given}: it writes the plan that is found for a byte budget")
        check_output_file("--out", out)
        if Path(out).exists() and not overwrite:
            raise ConfigError(f"--out {out}: exists, perhaps edited; choose another name or pass --overwrite")
    planned = request.planned
    if request.budget is not None:
        planned = plan_for_budget(src, request.config, request.budget, progress)
    if out is not None and planned is not None:
        write_output_file("--out", out, planned.text)
    reader = SourceReader(src)
    if planned is None:
        return make_target(reader, request.config), None
    config = planned.config(request.config.device, request.config.workers)
    return make_target(reader, config, planned.compressed(open_source(reader))), planned


def kept_plan_path(dst: str | Path) -> Path:
    """Where the plan of an unfinished output is kept: beside it."""
    return Staging(dst).beside(".plan.yaml")
