"""A ResMoE checkpoint back to a dense Hugging Face checkpoint, expert by expert."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from compress_tools.architectures.base import MoEArchitecture
from compress_tools.architectures.registry import find_architecture
from compress_tools.errors import NumericalError
from compress_tools.format.loading_guard import GUARD_KEY
from compress_tools.format.parts.base import Rows
from compress_tools.format.tensors import dense_layer_bytes
from compress_tools.output.finish import say_finished, say_where
from compress_tools.output.run_identity import versions
from compress_tools.output.shard_names import group_by_bytes, shard_names
from compress_tools.output.staging import Staging
from compress_tools.output.writer import CheckpointWriter
from compress_tools.progress.listener import ProgressListener, Silent
from compress_tools.report import CARD_NAME, PLAN_NAME, RECIPE_NAME, REPORT_NAME, SOURCE_CARD_NAME, TIMINGS_NAME
from compress_tools.source.design_matrix import rows_to_expert
from compress_tools.source.moe_source import dense_tensors
from compress_tools.source.reader import CheckpointReader
from compress_tools.stored.checkpoint import ResMoECheckpoint

NOT_COPIED = {PLAN_NAME, RECIPE_NAME, REPORT_NAME, TIMINGS_NAME, CARD_NAME}


def restore(
    src: str | Path,
    dst: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: ProgressListener | None = None,
) -> int:
    """Write the dense checkpoint that a ResMoE checkpoint stands for.

    Args:
        src: ResMoE checkpoint.
        dst: output directory; appears when it is whole.
        resume: go on with an interrupted run.
        overwrite: replace ``dst`` and what an unfinished run left.
        progress: told of shards.
    Returns:
        total bytes of the written tensors.
    Raises:
        CheckpointError, ConfigError, FormatError, NumericalError, UnsupportedArchitectureError: see errors.py.
    """
    progress = progress or Silent()
    Staging(dst).check_apart(src)
    checkpoint = ResMoECheckpoint(src)
    reader, fmt = checkpoint.reader, checkpoint.fmt
    architecture = find_architecture(reader.config)
    if not architecture.known:
        progress.say(
            f"model_type {architecture.model_type!r} is no family that this version was tested with: experts come back "
            "as their names say they lay; see that your loader reports no missing weight"
        )
    identity = {"source": reader.fingerprint(), "recipe": "restore", "version": versions()}
    kept = checkpoint.plain_names
    total_bytes = sum(map(checkpoint.plain_bytes, kept)) + len(fmt.layers) * dense_layer_bytes(fmt)
    with CheckpointWriter(dst, identity, resume=resume, overwrite=overwrite) as writer:
        if writer.is_finished:
            CheckpointReader(writer.dst)
            say_finished(writer.dst, progress)
        else:
            _write(checkpoint, architecture, kept, total_bytes, writer, progress)
            say_where(writer, progress)
    return total_bytes


def _write(
    checkpoint: ResMoECheckpoint,
    architecture: MoEArchitecture,
    kept: list[str],
    total_bytes: int,
    writer: CheckpointWriter,
    progress: ProgressListener,
) -> None:
    reader, fmt = checkpoint.reader, checkpoint.fmt
    groups = group_by_bytes(kept, checkpoint.plain_bytes)
    layers = sorted(fmt.layers)
    filenames = shard_names(len(groups) + len(layers))
    progress.start(len(filenames))

    def copied(names: list[str]) -> dict[str, Tensor]:
        return {name: checkpoint.plain(name) for name in names}

    def dense_layer(layer: int) -> dict[str, Tensor]:
        progress.stage("restoring", fmt.num_experts, layer)
        experts, whole = [], checkpoint.with_layer(layer)
        for expert in range(fmt.num_experts):
            experts.append(rows_to_expert(_finite_rows(whole, layer, expert), whole.biases(layer, expert)))
            progress.step()
        return dense_tensors(architecture, fmt.names, layer, experts)

    makers = [*(partial(copied, group) for group in groups), *(partial(dense_layer, layer) for layer in layers)]
    shards: dict[str, tuple[str, ...]] = {}
    for filename, make in zip(filenames, makers, strict=True):
        record = writer.record(filename)
        if record is None:
            tensors = make()
            record = writer.write_shard(filename, tensors, {"names": list(tensors)})
        shards[filename] = tuple(record["names"])
        progress.shard_done()
    for name, why in reader.files().items():
        if why is not None:
            progress.say(f"left out: {name}: {why}")
    for file in reader.other_files():
        relative = file.relative_to(reader.path)
        if str(relative) not in NOT_COPIED:
            writer.copy_file(file, Path(CARD_NAME) if str(relative) == SOURCE_CARD_NAME else relative)
    config = {key: value for key, value in reader.config.items() if key not in (GUARD_KEY, "quantization_config")}
    writer.finish(config, shards, total_bytes)


def _finite_rows(checkpoint: ResMoECheckpoint, layer: int, expert: int) -> Rows:
    """A restored expert in the checkpoint's dtype.

    Raises:
        NumericalError: it does not fit.
    """
    rows = {projection: matrix.to(checkpoint.dtype) for projection, matrix in checkpoint.expert(layer, expert).items()}
    for projection, matrix in rows.items():
        if not torch.isfinite(matrix).all():
            raise NumericalError(
                f"{checkpoint.reader.path}: layer {layer}, expert {expert}, {projection}: the restored weights are "
                f"beyond {checkpoint.fmt.dtype}; expected finite numbers; the checkpoint is damaged, compress again"
            )
    return rows
