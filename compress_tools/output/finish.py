"""The last step, once every shard is there: report, recipe, model card and index beside them, then the rename."""

import json
from pathlib import Path
from typing import Any

from compress_tools.output.model_card import model_card
from compress_tools.output.outline import Outline
from compress_tools.output.writer import CheckpointWriter
from compress_tools.report import (
    CARD_NAME,
    PLAN_NAME,
    RECIPE_NAME,
    REPORT_NAME,
    TIMINGS_NAME,
    CompressionReport,
    LayerReport,
)


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
    )


def read_report(directory: Path, outline: Outline) -> CompressionReport:
    """The report that a finished checkpoint holds."""
    content = json.loads((directory / REPORT_NAME).read_text(encoding="utf-8"))
    return CompressionReport(
        [LayerReport(**layer) for layer in content["layers"]],
        outline.expert_bytes_before,
        outline.expert_bytes_after,
        outline.other_bytes,
        json.loads((directory / TIMINGS_NAME).read_text(encoding="utf-8")),
        content["shards"],
    )


def output_name_of_file(relative: Path) -> Path:
    """Where a file of the source that is not weights goes: its own place; the model's card makes room for ours."""
    return Path("SOURCE_README.md") if str(relative) == CARD_NAME else relative


def finish(
    writer: CheckpointWriter, outline: Outline, files: dict[Path, Path], records: dict[str, dict[str, Any]]
) -> CompressionReport:
    """Write everything but the shards, and publish.

    Args:
        writer: holds every shard of ``outline``.
        outline: of the checkpoint.
        files: files to copy through: relative output path to source path.
        records: by output file, as the writer returned them.
    Returns:
        the report that is also written.
    Raises:
        CheckpointError: the disk is full or fails; can be resumed.
    """
    report = make_report(outline, records)
    for relative, file in files.items():
        writer.copy_file(file, relative)
    planned = {"plan": outline.recipe["plan"]} if outline.plan_text is not None else {}
    if outline.plan_text is not None:
        writer.write_text(PLAN_NAME, outline.plan_text)
    writer.write_json(RECIPE_NAME, {**outline.recipe, "resolved_layers": outline.resolved_layers})
    writer.write_json(REPORT_NAME, {**report.content(), **planned})
    writer.write_json(TIMINGS_NAME, report.seconds)
    writer.write_text(CARD_NAME, model_card(outline, writer.dst.name, report))
    writer.finish(
        outline.config,
        {filename: tuple(names) for filename, (_, names) in outline.shards.items()},
        outline.expert_bytes_after + outline.other_bytes,
    )
    return report
