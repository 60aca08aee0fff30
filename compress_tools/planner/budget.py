"""From a byte budget to a plan: measured, chosen, written down."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from compress_tools.config import CompressionConfig
from compress_tools.errors import CheckpointError
from compress_tools.format.shard_file import file_checksum
from compress_tools.output.run_identity import versions
from compress_tools.planner.config import PlannerConfig
from compress_tools.planner.plan_file import PlanFile, parse_plan
from compress_tools.planner.plan_text import plan_text
from compress_tools.planner.planner import find_plan
from compress_tools.progress.listener import ProgressListener
from compress_tools.source.files import CheckpointFiles
from compress_tools.source.reader import CheckpointReader
from compress_tools.source.source_reader import SourceReader
from compress_tools.text_file import in_words


def plan_for_budget(
    src: str | Path | CheckpointFiles,
    config: CompressionConfig,
    budget: PlannerConfig,
    progress: ProgressListener | None = None,
) -> PlanFile:
    """Plan for a budget.

    Args:
        src: source directory, or a model of the hub; only read.
        config: layers, how centers are found, device, workers.
        budget: what is asked.
        progress: told of layers and experts.
    Raises:
        ConfigError, UnsupportedArchitectureError, CheckpointError, NumericalError: see errors.py.
    """
    reader = SourceReader(src)
    planned = find_plan(reader, config, budget, progress)
    text = plan_text(planned, config, budget, Path(str(src)).name, request_digest(reader, config, budget))
    return replace(parse_plan(text, "the plan found"), found=planned)


def request_digest(reader: CheckpointReader, config: CompressionConfig, budget: PlannerConfig) -> str:
    """What determines a plan, in a few letters.

    Raises:
        CheckpointError: the source's weights, or the calibration file, can't be read.
    """
    calibration = ""
    if budget.calibration is not None:
        try:
            calibration = file_checksum(Path(budget.calibration))
        except OSError as err:
            raise CheckpointError(f"--calibration {budget.calibration}: not readable: {in_words(err)}") from err
    content = [reader.fingerprint(), config.recipe(), budget.model_dump(), calibration, versions()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
