"""The whole way in order, one MoE layer at a time: read, find the center, code the residuals, write."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from compress_tools import __version__
from compress_tools.checkpoint_reader import CheckpointReader
from compress_tools.checkpoint_writer import CheckpointWriter, free_bytes
from compress_tools.config import CompressionConfig
from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.layer_compression import compress_layer
from compress_tools.plan import CompressionPlan, Shard, make_plan
from compress_tools.progress import ProgressListener, Silent
from compress_tools.report import (
    CARD_NAME,
    RECIPE_NAME,
    REPORT_NAME,
    TIMINGS_NAME,
    CompressionReport,
    LayerReport,
    model_card,
)


def compress(
    src: str | Path,
    dst: str | Path,
    config: CompressionConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: ProgressListener | None = None,
) -> CompressionReport:
    """Compress a Hugging Face MoE checkpoint into a ResMoE checkpoint.

    Args:
        src: source directory; only read.
        dst: output directory; appears when it is whole.
        config: the recipe.
        resume: go on with an interrupted run.
        overwrite: replace ``dst``.
        progress: told of shards and stages.
    Returns:
        the report that is also written to ``dst``.
    Raises:
        ConfigError, UnsupportedArchitectureError, CheckpointError, NumericalError: see errors.py.
    """
    progress = progress or Silent()
    src, dst = Path(src), Path(dst)
    _check_device(config.device)
    reader = CheckpointReader(src)
    if dst.absolute().resolve() == src.absolute().resolve():
        raise ConfigError(f"{dst}: source and destination are the same directory")
    plan = make_plan(reader, config)
    identity = {"source": reader.fingerprint(), "recipe": config.recipe(), "version": versions()}
    writer = CheckpointWriter(dst, identity, resume=resume, overwrite=overwrite)
    _check_space(writer, plan)
    progress.start(len(plan.shards))
    layers: list[LayerReport] = []
    seconds: dict[str, dict[str, float]] = {}
    for shard in plan.shards:
        record = writer.record(shard.filename)
        if record is None:
            record = _write(plan, config, shard, writer, progress)
        if shard.layer is not None:
            layers.append(LayerReport(**record["layer"]))
            seconds[str(shard.layer)] = record["seconds"]
            progress.say(f"layer {shard.layer}: relative error {layers[-1].relative_error:.6f}")
        progress.shard_done()
    report = CompressionReport(layers, plan.expert_bytes_before, plan.expert_bytes_after, plan.other_bytes, seconds)
    _finish(reader, src, dst, config, plan, report, writer)
    return report


def versions() -> dict[str, str]:
    """Versions that can change the bytes."""
    return {"resmoe": __version__, "torch": torch.__version__}


def _write(
    plan: CompressionPlan,
    config: CompressionConfig,
    shard: Shard,
    writer: CheckpointWriter,
    progress: ProgressListener,
) -> dict[str, Any]:
    record: dict[str, Any] = {}
    if shard.layer is None:
        progress.stage("copying other tensors", len(shard.names))
        tensors = {}
        for name in shard.names:
            tensors[plan.source.output_name(name)] = plan.source.reader.get(name)
            progress.step()
    else:
        tensors, layer_report, seconds = compress_layer(plan, config, shard.layer, progress)
        record = {"layer": asdict(layer_report), "seconds": seconds}
    writer.write_shard(shard.filename, tensors, record)
    return record


def _finish(
    reader: CheckpointReader,
    src: Path,
    dst: Path,
    config: CompressionConfig,
    plan: CompressionPlan,
    report: CompressionReport,
    writer: CheckpointWriter,
) -> None:
    for file in reader.other_files():
        relative = file.relative_to(reader.path)
        writer.copy_file(file, Path("SOURCE_README.md") if str(relative) == CARD_NAME else relative)
    writer.write_json(RECIPE_NAME, {**config.recipe(), "resolved_layers": sorted(plan.fmt.layers)})
    writer.write_json(REPORT_NAME, report.content())
    writer.write_json(TIMINGS_NAME, report.seconds)
    writer.write_text(CARD_NAME, model_card(src, dst, config, plan, report))
    writer.finish(
        {**reader.config, "quantization_config": plan.fmt.model_dump(mode="json")},
        {shard.filename: tuple(map(plan.source.output_name, shard.names)) for shard in plan.shards},
        report.expert_bytes_after + report.other_bytes,
    )


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as err:
        raise ConfigError(f"--device {device}: not a device; expected cpu, cuda or cuda:N") from err
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: this machine has no usable CUDA device; use --device cpu")
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: expected cpu, cuda or cuda:N")


def _check_space(writer: CheckpointWriter, plan: CompressionPlan) -> None:
    written = sum(
        (writer.staging / shard.filename).stat().st_size
        for shard in plan.shards
        if (writer.staging / shard.filename).is_file()
    )
    needed = plan.expert_bytes_after + plan.other_bytes - written
    free = free_bytes(writer.staging)
    if needed > free:
        raise CheckpointError(
            f"{writer.dst}: needs {needed} bytes, {free} are free; make room, then run again with --resume"
        )
