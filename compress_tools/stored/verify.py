"""Check a ResMoE checkpoint, and recompute its error against the source without trusting its report."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from compress_tools.architectures.registry import find_architecture
from compress_tools.center.alignment import align_experts
from compress_tools.errors import FormatError
from compress_tools.format.shard_file import file_checksum
from compress_tools.numerics.products import squared_distance, squared_norm
from compress_tools.numerics.work import Work
from compress_tools.report import REPORT_NAME
from compress_tools.source.design_matrix import expert_to_rows, rows_to_design
from compress_tools.source.moe_source import MoESource, check_whole, open_source
from compress_tools.source.reader import CheckpointReader
from compress_tools.stored.checkpoint import ResMoECheckpoint

# The best matching of restored rows to source rows can only beat the one the report was made with.
REPORT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class LayerVerdict:
    """One verified layer; the errors are None without a source.

    Attributes:
        layer: decoder layer index.
        experts: experts accounted for.
        relative_error: recomputed, rows matched anew by optimal assignment.
        reported_relative_error: from the report beside the weights.
    """

    layer: int
    experts: int
    relative_error: float | None
    reported_relative_error: float | None


def verify(
    path: str | Path,
    against: str | Path | None = None,
    workers: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> list[LayerVerdict]:
    """Check layers, names, shapes, finiteness, masks, and each weight file's bytes by the checksum in the report.

    With a source, copied tensors and the reported error too.

    Raises:
        CheckpointError, FormatError, NumericalError: what is wrong, and where.
    """
    checkpoint = ResMoECheckpoint(path)
    source = open_source(CheckpointReader(against)) if against is not None else None
    check_whole(find_architecture(checkpoint.reader.config), checkpoint.reader, checkpoint.fmt.layers)
    reported, checksums = _read_report(Path(path))
    _check_bytes(Path(path), checksums)
    if source is not None:
        _check_copied(checkpoint, source)
    verdicts = []
    for layer in sorted(checkpoint.fmt.layers):
        checkpoint.check_values(layer)
        error = _layer_error(checkpoint, source, layer, workers) if source is not None else None
        verdict = LayerVerdict(layer, checkpoint.fmt.num_experts, error, reported.get(layer))
        _check_report(Path(path), verdict)
        verdicts.append(verdict)
        advance()
    return verdicts


def _read_report(path: Path) -> tuple[dict[int, float], dict[str, str]]:
    """Relative errors by layer and checksums by weight file; both empty without a report."""
    file = path / REPORT_NAME
    if not file.is_file():
        return {}, {}
    try:
        content = json.loads(file.read_text())
        errors = {layer["layer"]: layer["relative_error"] for layer in content["layers"]}
        return errors, dict(content.get("shards", {}))
    except (ValueError, KeyError, TypeError) as err:
        raise FormatError(f"{file}: not a report of this version: {err}") from err


def _check_bytes(path: Path, checksums: dict[str, str]) -> None:
    for name, checksum in checksums.items():
        if not (path / name).is_file():
            raise FormatError(f"{path}: {name} is missing")
        if file_checksum(path / name) != checksum:
            raise FormatError(f"{path}: {name} is not the file that was written: its SHA-256 differs from the report's")


def _check_copied(checkpoint: ResMoECheckpoint, source: MoESource) -> None:
    path = source.reader.path
    replaced = {name for layer in checkpoint.fmt.layers for name in source.expected(layer)}
    for name in source.reader.names:
        if name in replaced:
            continue
        copied = source.output_name(name)
        if copied not in checkpoint.reader:
            raise FormatError(f"{checkpoint.reader.path}: {copied!r} of {path} is missing")
        if not torch.equal(checkpoint.reader.get(copied), source.reader.get(name)):
            raise FormatError(f"{checkpoint.reader.path}: {copied!r} differs from {path}; not made from it")


def _layer_error(checkpoint: ResMoECheckpoint, source: MoESource, layer: int, workers: int) -> float:
    error = energy = 0.0
    for expert in range(checkpoint.fmt.num_experts):
        weights = expert_to_rows(source.read_expert(layer, expert))
        design = rows_to_design(weights)
        rows = checkpoint.expert(layer, expert)
        restored = rows_to_design({projection: rows[projection] for projection in weights})
        (perm,) = align_experts(design.unsqueeze(0), restored, work=Work(workers)).perm
        error += squared_distance(design[perm], restored)
        energy += squared_norm(design)
    return error / energy


def _check_report(path: Path, verdict: LayerVerdict) -> None:
    found, reported = verdict.relative_error, verdict.reported_relative_error
    if found is None or reported is None:
        return
    if found > reported * (1 + REPORT_TOLERANCE) + 1e-9:
        raise FormatError(
            f"{path}: layer {verdict.layer}: relative error against the source is {found:.6g}, "
            f"its report says {reported:.6g}; the weights are not the ones that were written"
        )
