"""The last step, once every shard is there: report, recipe, model card and index beside them, then the rename."""

import json
from math import inf
from pathlib import Path
from typing import Any

from compress_tools.damage import damage_warning, refusal
from compress_tools.errors import CheckpointError
from compress_tools.output.model_card import model_card
from compress_tools.output.outline import Outline
from compress_tools.output.trusted_code import must_be_trusted
from compress_tools.output.writer import CheckpointWriter
from compress_tools.progress.listener import ProgressListener
from compress_tools.report import (
    CARD_NAME,
    PLAN_NAME,
    RECIPE_NAME,
    REPORT_NAME,
    SOURCE_CARD_NAME,
    TIMINGS_NAME,
    CompressionReport,
    LayerReport,
)
from compress_tools.source.reader import CheckpointReader
from compress_tools.text_file import in_words


def make_report(outline: Outline, records: dict[str, dict[str, Any]]) -> CompressionReport:
    """The report of a checkpoint whose shards are all written.

    Args:
        outline: of the checkpoint.
        records: by output file, as ``CheckpointWriter.write_shard`` returns them.
    """
    layers = {filename: layer for filename, (layer, _) in outline.shards.items() if layer is not None}
    return CompressionReport(
        [LayerReport(**records[filename]["layer"]) for filename in layers],
        outline.expert_bytes_before,
        outline.expert_bytes_after,
        outline.other_bytes,
        {str(layer): records[filename]["seconds"] for filename, layer in layers.items()},
        {filename: records[filename]["sha256"] for filename in outline.shards},
        outline.decoded,
        outline.left_out,
        outline.origin,
        outline.other_bytes_after,
    )


def read_report(directory: Path) -> CompressionReport:
    """The report that a finished checkpoint holds.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    file = directory / REPORT_NAME
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        timings = directory / TIMINGS_NAME
        return CompressionReport(
            [LayerReport(**layer) for layer in content["layers"]],
            content["expert_bytes_before"],
            content["expert_bytes_after"],
            content["other_bytes"],
            json.loads(timings.read_text(encoding="utf-8")) if timings.is_file() else {},
            content["shards"],
            content.get("decoded", {}),
            content.get("left_out", {}),
            content.get("source", {}),
            content.get("other_bytes_after"),
        )
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise CheckpointError(
            f"{file}: not readable: {in_words(err)}; make the checkpoint again with --overwrite"
        ) from err


def finished_report(dst: Path, progress: ProgressListener) -> CompressionReport:
    """The report of a checkpoint that an earlier run finished, once it is known that its weights are there.

    Raises:
        CheckpointError: a weight file or the report is missing or damaged.
    """
    CheckpointReader(dst)
    report = read_report(dst)
    say_finished(dst, progress)
    return report


def say_finished(dst: Path, progress: ProgressListener) -> None:
    """Tell that nothing was left to do."""
    progress.say(f"{dst} is finished, from the same source, recipe and versions: nothing to do")


def say_where(writer: CheckpointWriter, progress: ProgressListener) -> None:
    """Tell a user who stood in the destination that it is another directory now."""
    if writer.replaced_working_directory:
        progress.say(f"{writer.dst} is a new directory: `cd .` takes a shell that stood in the old one there")


def output_name_of_file(relative: Path) -> Path:
    """Where a file of the source that is not weights goes: its own place; the model's card makes room for ours."""
    return Path(SOURCE_CARD_NAME) if str(relative) == CARD_NAME else relative


def resume_forced(writer: CheckpointWriter) -> str:
    """How to go on with what was refused."""
    return f"the same command with --resume --force goes on from {writer.staging}, and --overwrite starts again"


def finish(
    writer: CheckpointWriter,
    outline: Outline,
    files: dict[Path, Path],
    records: dict[str, dict[str, Any]],
    progress: ProgressListener,
    most_error: float = inf,
) -> CompressionReport:
    """Write everything but the shards, and publish.

    Args:
        writer: holds every shard of ``outline``.
        outline: of the checkpoint.
        files: files to copy through: relative output path to source path.
        records: by output file, as the writer returned them.
        progress: told where the checkpoint lies, if that needs to be said; and of a ruined result.
        most_error: mean relative error above which nothing is published; the shards stay, for a resume.
    Returns:
        the report that is also written.
    Raises:
        ConfigError: the error is above ``most_error``.
        CheckpointError: the disk is full or fails; can be resumed.
    """
    report = make_report(outline, records)
    if report.relative_error > most_error:
        raise refusal(report.relative_error, "over all layers", resume_forced(writer))
    if (warning := damage_warning(report.errors)) is not None:
        progress.say(warning)
    for relative, file in files.items():
        writer.copy_file(file, relative)
    planned = {"plan": outline.recipe["plan"]} if outline.plan_text is not None else {}
    if outline.plan_text is not None:
        writer.write_text(PLAN_NAME, outline.plan_text)
    writer.write_json(RECIPE_NAME, {**outline.recipe, "resolved_layers": outline.resolved_layers})
    writer.write_json(REPORT_NAME, {**report.content(), **planned})
    writer.write_json(TIMINGS_NAME, report.seconds)
    trust = must_be_trusted(writer.staging, outline.config)
    writer.write_text(CARD_NAME, model_card(outline, writer.dst.name, report, trust=trust))
    writer.finish(
        outline.config,
        {filename: tuple(names) for filename, (_, names) in outline.shards.items()},
        report.expert_bytes_after + report.other_after,
    )
    say_where(writer, progress)
    return report
