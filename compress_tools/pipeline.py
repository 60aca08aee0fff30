"""The whole way in order, one MoE layer at a time: read, find the center, code the residuals, write."""

from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

from torch import Tensor

from compress_tools.config import CompressionConfig, check_device
from compress_tools.damage import refusal
from compress_tools.errors import NumericalError
from compress_tools.format.dtypes import DTYPES
from compress_tools.format.finite import ALLOW_VARIABLE, all_finite, plain_fault
from compress_tools.format.rest import encode_rows, row_names
from compress_tools.format.tensors import layer_bytes
from compress_tools.importance import CalibrationFile, opened_calibration
from compress_tools.layer import CompressedLayer, compress_layer
from compress_tools.numerics.clock import StageClock
from compress_tools.numerics.parallel import one_thread_each
from compress_tools.numerics.work import Work
from compress_tools.output.finish import finish, finished_report, output_name_of_file, resume_forced, say_finished
from compress_tools.output.outline import Outline, make_outline
from compress_tools.output.run_identity import MACHINE, machine, versions
from compress_tools.output.staging import Staging
from compress_tools.output.target import CompressionTarget, Shard, make_target
from compress_tools.output.writer import CheckpointWriter, check_space
from compress_tools.planner.plan_file import PlanFile
from compress_tools.progress.listener import ProgressListener, Silent
from compress_tools.report import CompressionReport, LayerReport
from compress_tools.slices.slices import Slice, files_of, finish_slice, read_slice, shards_of, slice_path
from compress_tools.source.files import CheckpointFiles
from compress_tools.source.layer_weights import read_layer
from compress_tools.source.moe_source import open_source
from compress_tools.source.source_reader import SourceReader


def compress(  # noqa: PLR0913  source, destination, recipe or plan, and how the run behaves
    src: str | Path | CheckpointFiles,
    dst: str | Path,
    config: CompressionConfig,
    *,
    planned: PlanFile | None = None,
    resume: bool = False,
    overwrite: bool = False,
    most_error: float = inf,
    progress: ProgressListener | None = None,
) -> CompressionReport:
    """Compress a Hugging Face MoE checkpoint into a ResMoE checkpoint.

    Args:
        src: source directory, or a model of the hub (``hub.files.source_files``); only read.
        dst: output directory; appears when it is whole.
        config: the recipe.
        planned: how each layer is stored, and how centers are found, in place of the recipe's; device and workers
            are still the recipe's.
        resume: go on with an interrupted run.
        overwrite: replace ``dst``.
        most_error: mean relative error above which the run ends, as soon as that is known, and can be resumed.
        progress: told of shards, layers and stages.
    Returns:
        the report that is also written to ``dst``.
    Raises:
        ConfigError, UnsupportedArchitectureError, CheckpointError, NumericalError: see errors.py.
    """
    progress = progress or Silent()
    job = _prepare(src, Path(dst), config, planned, most_error)
    with CheckpointWriter(dst, job.identity, resume=resume, overwrite=overwrite) as writer:
        if writer.is_finished:
            return finished_report(writer.dst, progress)
        records = _write_shards(job, list(job.target.shards), job.files, writer, progress)
        return finish(writer, job.outline, job.files, records, progress, most_error)


def compress_slice(  # noqa: PLR0913  what compress takes, and the slice
    src: str | Path | CheckpointFiles,
    dst: str | Path,
    config: CompressionConfig,
    part: Slice,
    *,
    planned: PlanFile | None = None,
    resume: bool = False,
    overwrite: bool = False,
    most_error: float = inf,
    progress: ProgressListener | None = None,
) -> Path:
    """Make one slice of what ``compress`` makes; ``merge`` joins all of them.

    Args:
        src: source directory, or a model of the hub (``hub.files.source_files``); only read.
        dst: the whole checkpoint's directory to be; the slice goes beside it, and appears when it is whole.
        config: the recipe.
        part: which slice.
        planned: see ``compress``.
        resume: go on with an interrupted run.
        overwrite: replace the slice.
        most_error: see ``compress``; of this slice's layers.
        progress: told of shards, layers and stages.
    Returns:
        the slice's directory.
    Raises:
        ConfigError, UnsupportedArchitectureError, CheckpointError, NumericalError: see errors.py.
    """
    progress = progress or Silent()
    job = _prepare(src, Path(dst), config, planned, most_error)
    shards = shards_of(job.target, part)
    target = slice_path(dst, part)
    with CheckpointWriter(target, job.identity, resume=resume, overwrite=overwrite) as writer:
        if writer.is_finished:
            read_slice(target).check_shards()
            say_finished(writer.dst, progress)
        else:
            files = files_of(job.files, part)
            records = _write_shards(job, shards, files, writer, progress)
            finish_slice(writer, part, job.outline, files, records)
    return target


@dataclass(frozen=True)
class _Job:
    """A validated request: nothing is left to refuse but the disk."""

    config: CompressionConfig
    target: CompressionTarget
    outline: Outline
    identity: dict[str, Any]
    files: dict[Path, Path]
    most_error: float
    calibration: CalibrationFile | None


def _prepare(
    src: str | Path | CheckpointFiles,
    dst: Path,
    config: CompressionConfig,
    planned: PlanFile | None,
    most_error: float,
) -> _Job:
    check_device(config.device)
    reader = SourceReader(src)
    Staging(dst).check_apart(reader.path)
    calibration = None if config.calibration is None else opened_calibration(config.calibration, reader.fingerprint())
    if planned is None:
        target = make_target(reader, config)
    else:
        config = planned.config(config.device, config.workers)
        target = make_target(reader, config, planned.compressed(open_source(reader)))
    recipe = config.recipe() if planned is None else {"plan": planned.resolved()}
    if calibration is not None:
        recipe = {**recipe, "calibration": calibration.digest()}
    outline = make_outline(src, recipe, target, None if planned is None else planned.text)
    identity = {
        "source": reader.fingerprint(),
        "recipe": outline.recipe,
        "version": versions(),
        MACHINE: machine(config.device),
    }
    files = {output_name_of_file(file.relative_to(reader.path)): file for file in reader.other_files()}
    return _Job(config, target, outline, identity, files, most_error, calibration)


def _write_shards(
    job: _Job, shards: list[Shard], files: dict[Path, Path], writer: CheckpointWriter, progress: ProgressListener
) -> dict[str, dict[str, Any]]:
    records = {shard.filename: record for shard in shards if (record := writer.record(shard.filename)) is not None}
    outstanding, store = [shard for shard in shards if shard.filename not in records], job.target.source.reader.store
    read = {shard.filename: job.target.source.reader.shards_of(_names_read(job, shard)) for shard in outstanding}
    needed = sum(_file_bytes(job, shard) for shard in outstanding)
    of_layers = [read[shard.filename] for shard in outstanding if shard.layer is not None]
    check_space(writer, needed + store.disk_bytes(of_layers), files)
    begun, here = writer.identity[MACHINE], job.identity[MACHINE]
    for remark in job.target.remarks():
        progress.say(remark)
    progress.start(len(shards))
    if records:
        progress.say(f"resuming: {len(records)} of {len(shards)} shards are written")
    if begun != here:
        progress.say(f"begun on {begun}, goes on on {here}: the result is as good, but its last bits may differ")
    errors: list[float] = []
    store.prepare(sorted({name for names in read.values() for name in names}))
    with one_thread_each():
        for shard in _in_order(job, shards):
            if shard.filename not in records:
                records[shard.filename] = _write(job, shard, writer, progress)
            record = records[shard.filename]
            if shard.layer is not None:
                progress.layer_done(LayerReport(**record["layer"]), record["seconds"])
                errors.append(record["layer"]["relative_error"])
                _check_damage(job, errors, sum(each.layer is not None for each in shards), writer)
            progress.shard_done()
    return records


def _check_damage(job: _Job, errors: list[float], count: int, writer: CheckpointWriter) -> None:
    """End a run that will be refused: hours may be left.

    Layers that are all stored alike lose about alike, so the first ones tell. A plan's need not: there the mean is
    above the limit for certain, whatever the rest loses.
    """
    known = len(errors) if job.outline.plan_text is None else count
    if (found := sum(errors) / known) > job.most_error:
        raise refusal(found, f"after {len(errors)} of {count} layers", resume_forced(writer))


def _write(job: _Job, shard: Shard, writer: CheckpointWriter, progress: ProgressListener) -> dict[str, Any]:
    if shard.layer is None:
        return writer.write_shard(shard.filename, _copied(job, shard, progress), {})
    made, seconds = _read_and_compress(job, shard.layer, progress)
    progress.stage("writing", None, shard.layer)
    return writer.write_shard(shard.filename, made.tensors, {"layer": asdict(made.report), "seconds": seconds})


def _in_order(job: _Job, shards: list[Shard]) -> list[Shard]:
    """Copied tensors, then layers as the source's files are best read."""
    layers = job.target.source.as_they_lie(shard.layer for shard in shards if shard.layer is not None)
    return sorted(shards, key=lambda shard: -1 if shard.layer is None else layers.index(shard.layer))


def _names_read(job: _Job, shard: Shard) -> Collection[str]:
    """Names of the source's tensors that an output file is made from."""
    return shard.copied if shard.layer is None else job.target.source.expected(shard.layer)


def _copied(job: _Job, shard: Shard, progress: ProgressListener) -> dict[str, Tensor]:
    job.target.source.need_copied(shard.copied, job.target.fmt.layers)
    progress.stage("copying other tensors", len(shard.copied))
    uses = Counter(shard.copied)
    tensors: dict[str, Tensor] = {}
    for name, copied in zip(shard.names, shard.copied, strict=True):
        tensor = job.target.source.reader.get(copied)
        finite = all_finite(tensor)
        if name in job.target.fmt.rest_tensors:
            if not finite:
                raise NumericalError(
                    f"{job.target.source.reader.path}: {copied!r} holds NaN or Inf, which codes can't hold; "
                    f"--rest-bits 16 with {ALLOW_VARIABLE}=1 copies it as it is"
                )
            tensors |= zip(row_names(name), encode_rows(tensor), strict=True)
        else:
            if not finite:
                if fault := plain_fault(tensor):
                    raise NumericalError(f"{job.target.source.reader.path}: {copied!r} {fault}")
                progress.say(f"{copied} holds NaN or Inf; it is copied as it is")
            # One tensor under two names shares its memory, which safetensors refuses.
            tensors[name] = tensor.clone() if uses[copied] > 1 else tensor
        progress.step()
    progress.stage("writing other tensors", None)
    return tensors


def _read_and_compress(job: _Job, layer: int, progress: ProgressListener) -> tuple[CompressedLayer, dict[str, float]]:
    """One layer, and its seconds by stage; the weights as read are gone before it is written."""
    config, clock = job.config, StageClock()
    weights = read_layer(job.target.source, layer, DTYPES[job.target.fmt.dtype], config.device, progress, clock)
    source = job.target.source
    importance = None
    if job.calibration is not None and not job.calibration.lacks(layer, source.drafts):
        importance = job.calibration.layer(layer, source.projections, source.sizes)
    made = compress_layer(job.target, config, layer, weights, Work(config.workers, progress, clock), importance)
    return made, clock.seconds


def _file_bytes(job: _Job, shard: Shard) -> int:
    """Bytes of an output file, its header estimated from above."""
    header = sum(len(name) + 128 for name in shard.tensors) + 1024
    if shard.layer is not None:
        return layer_bytes(job.target.fmt, shard.layer) + header
    return job.target.copied_bytes(shard) + header
