"""Check a ResMoE checkpoint, and recompute its error against the source without trusting its report."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_tools.architectures.base import MoEArchitecture
from compress_tools.architectures.experts import MoESizes
from compress_tools.architectures.registry import find_architecture
from compress_tools.center.alignment import align_experts
from compress_tools.errors import ConfigError, FormatError, NumericalError, ResMoEError
from compress_tools.format.dtypes import DTYPES, SAFETENSORS_NAMES
from compress_tools.format.finite import plain_fault
from compress_tools.format.parts.base import SCALE_DTYPE, TensorSpec
from compress_tools.format.rest import ROW_CODES_DTYPE, row_names
from compress_tools.format.schema import QUANT_METHOD
from compress_tools.format.shard_file import SinglePass, StoredTensor, is_file_name
from compress_tools.format.tensors import is_resmoe_name, layer_tensors
from compress_tools.numerics.products import squared_distance, squared_norm
from compress_tools.numerics.work import Work
from compress_tools.progress.listener import ProgressListener, Silent
from compress_tools.report import LAYER_KEYS, REPORT_KEYS, REPORT_NAME
from compress_tools.source.completeness import check_whole
from compress_tools.source.design_matrix import expert_to_rows, rows_to_design
from compress_tools.source.files import CheckpointFiles
from compress_tools.source.model_fit import PlainPart, PlainTensor, check_fit
from compress_tools.source.moe_source import MoESource, open_source
from compress_tools.source.reader import CheckpointReader
from compress_tools.source.source_reader import SourceReader
from compress_tools.source.stored_bytes import as_tensor
from compress_tools.stored.account import altered_file, check_index, check_keys
from compress_tools.stored.census import Census, take_census
from compress_tools.stored.checkpoint import ResMoECheckpoint
from compress_tools.text_file import in_words, read_json_object

# The best matching of restored rows to source rows can only beat the one the report was made with.
REPORT_TOLERANCE = 1e-3
# Weights of a matrix in codes that are compared at a time.
_ROWS_AT_A_TIME = 2**24
_ROW_DTYPES = {SAFETENSORS_NAMES[name]: DTYPES[name] for name in (ROW_CODES_DTYPE, SCALE_DTYPE)}


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


@dataclass(frozen=True)
class RestVerdict:
    """The verified matrices in codes beside the routed experts.

    Attributes:
        matrices: how many.
        relative_error: of all together, recomputed; None without a source.
    """

    matrices: int
    relative_error: float | None


@dataclass(frozen=True)
class Verification:
    """A checkpoint in order.

    Attributes:
        layers: its compressed layers.
        census: where the tensors and files of the source went; None without a source.
        rest: its matrices in codes; None where it has none.
    """

    layers: list[LayerVerdict]
    census: Census | None
    rest: RestVerdict | None = None


def verify(
    path: str | Path,
    against: str | Path | CheckpointFiles | None = None,
    workers: int = 1,
    progress: ProgressListener | None = None,
) -> list[LayerVerdict]:
    """``verification`` for callers that ask for the layers alone."""
    return verification(path, against, workers, progress).layers


def verification(
    path: str | Path,
    against: str | Path | CheckpointFiles | None = None,
    workers: int = 1,
    progress: ProgressListener | None = None,
) -> Verification:
    """Check layers, names, shapes, finiteness, masks, and each weight file's bytes by the checksum in the report.

    With a source, the reported error too, and that all of its tensors and files are accounted for: replaced, copied
    bit for bit, or named in the report as left out, and nothing else is there. Each weight file is read once, from its
    first byte to its last: hashed, and its tensors checked from the same bytes. A layer's tensors are kept until the
    layer is whole.

    Args:
        path: the ResMoE checkpoint.
        against: the source that it was made from: a directory, or a model of the hub.
        workers: assignments solved in parallel.
        progress: told of files, tensors, and experts that are compared.
    Raises:
        CheckpointError, FormatError, NumericalError: what is wrong, and where.
        ConfigError: ``against`` is a ResMoE checkpoint itself.
    """
    try:
        checkpoint = ResMoECheckpoint(path)
        if checkpoint.reader.remarks:
            raise FormatError(f"{path}: {'; '.join(checkpoint.reader.remarks)}; not as it was written")
        source = None if against is None else _open_original(against, checkpoint)
        plain = _check_rest(checkpoint)
        report = _read_report(checkpoint.reader.path)
        census = None if source is None else take_census(checkpoint, source, report.left_out)
        if source is None:
            check_fit(plain)
    except ConfigError:
        raise
    except ResMoEError as err:
        if (altered := altered_file(Path(path), str(err))) is None:
            raise
        # Whatever follows from it, the file that is not as it was written is what is wrong.
        raise FormatError(f"{path}: {altered}; {str(err).removeprefix(f'{path}: ')}") from err
    if (altered := altered_file(Path(path))) is not None:
        raise FormatError(f"{path}: {altered}")
    run = _Verification(checkpoint, source, report, workers, progress or Silent())
    layers = run.run()
    if source is not None:
        # Where it differs from its source, that is what is wrong.
        check_fit(plain)
    # Last: what is wrong with a tensor makes the sum of all wrong.
    check_index(checkpoint.reader)
    return Verification(layers, census, run.rest())


@dataclass(frozen=True)
class _Report:
    """What the report beside the weights says; all empty without one.

    Attributes:
        errors: relative errors by layer.
        checksums: by weight file.
        left_out: why tensors and files of the source are not there.
    """

    errors: dict[int, float]
    checksums: dict[str, str]
    left_out: dict[str, str]


class _Verification:
    """One pass over all weight files.

    Args:
        checkpoint: what is verified.
        source: what it was made from, or None.
        report: what the report says.
        workers: assignments solved in parallel.
        progress: told of files, tensors, and experts that are compared.
    """

    def __init__(
        self,
        checkpoint: ResMoECheckpoint,
        source: MoESource | None,
        report: _Report,
        workers: int,
        progress: ProgressListener,
    ) -> None:
        self._checkpoint, self._source, self._workers, self._progress = checkpoint, source, workers, progress
        self._path = checkpoint.reader.path
        self._reported, self._checksums = report.errors, report.checksums
        # By layer the tensors that are still to come, and those that have been read.
        self._awaited = {layer: dict(layer_tensors(checkpoint.fmt, layer)) for layer in sorted(checkpoint.fmt.layers)}
        self._layer_of = {name: layer for layer, specs in self._awaited.items() for name in specs}
        self._held: dict[int, dict[str, Tensor]] = {layer: {} for layer in self._awaited}
        self._copied = {} if source is None else source.copied(checkpoint.fmt.layers)
        self._verdicts: dict[int, LayerVerdict] = {}
        # Which matrix a tensor of codes or scales is of, and what has been read of those that are not whole yet.
        self._coded = {own: name for name in checkpoint.fmt.rest_tensors for own in row_names(name)}
        self._rows: dict[str, dict[str, Tensor]] = {}
        self._rest_error = self._rest_energy = 0.0

    def rest(self) -> RestVerdict | None:
        """What was found of matrices in codes; after ``run``."""
        rest = self._checkpoint.fmt.rest
        if rest is None:
            return None
        error = None if self._source is None else _ratio(self._rest_error, self._rest_energy)
        return RestVerdict(len(rest.tensors), error)

    def run(self) -> list[LayerVerdict]:
        """See ``verify``."""
        files = sorted({*self._checkpoint.reader.shards, *self._checksums})
        for name in files:
            if not (self._path / name).is_file():
                raise FormatError(f"{self._path}: {name} is missing, a weight file by the index or {REPORT_NAME}")
        if self._source is not None:
            self._source.reader.store.prepare(self._source.reader.shards)
        self._progress.start(len(files), "file")
        for name in files:
            self._file(name)
            self._progress.shard_done()
        return [self._verdicts[layer] for layer in sorted(self._verdicts)]

    def _file(self, filename: str) -> None:
        reader = self._checkpoint.reader
        names = [name for name in reader.names if reader.shard_of(name) == filename]
        if self._source is not None:
            plain = [self._coded.get(name, name) for name in names]
            copied = [self._copied[name] for name in plain if name in self._copied]
            self._source.need_copied(copied, self._checkpoint.fmt.layers)
        self._progress.stage(f"reading {filename}", len(names))
        content = SinglePass(self._path / filename)
        wrong: FormatError | NumericalError | None = None
        for name, stored, octets in content:
            # Where the bytes are not those that were written, that is what is wrong, whatever follows from it.
            if wrong is None and name in reader and reader.shard_of(name) == filename:
                try:
                    self._tensor(name, stored, octets)
                except (FormatError, NumericalError) as err:
                    wrong = err
                self._progress.step()
        if self._checksums.get(filename, content.checksum) != content.checksum:
            first = "" if wrong is None else f"; {str(wrong).removeprefix(f'{self._path}: ')}"
            raise FormatError(
                f"{self._path}: {filename} is not the file that was written: its SHA-256 differs from the report's"
                f"{first}"
            ) from wrong
        if wrong is not None:
            raise wrong

    def _tensor(self, name: str, stored: StoredTensor, octets: bytearray) -> None:
        if self._source is not None and name in self._copied:
            self._check_copied(self._source.reader, name, stored, octets)
        if not is_resmoe_name(name):
            self._check_plain(name, stored, octets)
        if name in self._coded:
            matrix = self._coded[name]
            held = self._rows.setdefault(matrix, {})
            held[name] = torch.frombuffer(octets, dtype=_ROW_DTYPES[stored.dtype]).view(stored.shape)
            if len(held) == len(row_names(matrix)):
                self._matrix(matrix, self._rows.pop(matrix))
        if name not in self._layer_of:
            return
        layer = self._layer_of[name]
        self._held[layer][name] = _as_tensor(self._awaited[layer].pop(name), octets)
        if not self._awaited[layer]:
            self._layer(layer, self._held.pop(layer))

    def _check_copied(self, reader: CheckpointReader, name: str, stored: StoredTensor, octets: bytearray) -> None:
        original = self._copied[name]
        if (reader.dtype(original), reader.shape(original)) == (stored.dtype, stored.shape):
            theirs = reader.get(original).reshape(-1).view(torch.uint8)
            if not octets or torch.equal(theirs, torch.frombuffer(octets, dtype=torch.uint8)):
                return
        raise FormatError(f"{self._path}: {name!r} differs from {reader.path}; not made from it")

    def _check_plain(self, name: str, stored: StoredTensor, octets: bytearray) -> None:
        try:
            fault = plain_fault(as_tensor(octets, stored.dtype, stored.shape))
        except RuntimeError as err:
            raise FormatError(f"{self._path}: {name!r}: {stored.dtype} {list(stored.shape)}: {in_words(err)}") from err
        if fault:
            raise NumericalError(f"{self._path}: {name!r} {fault}")

    def _matrix(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """One matrix in codes: nothing forbidden in it, and of the source's each value within half a code."""
        codes, scales = self._checkpoint.with_tensors(tensors).check_rows(name)
        if self._source is None:
            return
        reader = self._source.reader
        original = reader.get(self._copied[name])
        if original.shape != codes.shape:
            raise FormatError(
                f"{self._path}: {name!r} is {list(codes.shape)} in codes, {list(original.shape)} in {reader.path}"
            )
        step = max(1, _ROWS_AT_A_TIME // codes.shape[1])
        for begin in range(0, len(codes), step):
            part = slice(begin, begin + step)
            weight, wide = original[part].float(), scales[part].float()
            off = codes[part].float() * wide - weight
            if (off.abs() > (0.5 + 2**-6) * wide).any():
                raise FormatError(f"{self._path}: {name!r} in codes differs from {reader.path}; not made from it")
            self._rest_error += float(off.square().sum(dtype=torch.float64))
            self._rest_energy += float(weight.square().sum(dtype=torch.float64))

    def _layer(self, layer: int, tensors: Mapping[str, Tensor]) -> None:
        checkpoint = self._checkpoint.with_tensors(tensors)
        checkpoint.check_values(layer)
        error = None if self._source is None else self._error(checkpoint, self._source, layer)
        verdict = LayerVerdict(layer, checkpoint.fmt.num_experts, error, self._reported.get(layer))
        _check_report(self._path, verdict)
        self._verdicts[layer] = verdict

    def _error(self, checkpoint: ResMoECheckpoint, source: MoESource, layer: int) -> float:
        source.reader.need(source.expected(layer))
        self._progress.stage("comparing with the source", checkpoint.fmt.num_experts, layer)
        error = energy = 0.0
        for expert in range(checkpoint.fmt.num_experts):
            weights = expert_to_rows(source.read_expert(layer, expert))
            design = rows_to_design(weights)
            rows = checkpoint.expert(layer, expert)
            restored = rows_to_design({projection: rows[projection] for projection in weights})
            (perm,) = align_experts(design.unsqueeze(0), restored, work=Work(self._workers)).perm
            error += squared_distance(design[perm], restored)
            energy += squared_norm(design)
            self._progress.step()
        return _ratio(error, energy)


def _ratio(error: float, energy: float) -> float:
    # What is all zeros is restored exactly, or infinitely badly.
    return error / energy if energy else inf if error else 0.0


def _check_rest(checkpoint: ResMoECheckpoint) -> PlainPart:
    """Everything that is not experts, which is all there."""
    reader, expert = checkpoint.reader, checkpoint.fmt.names.expert
    architecture = find_architecture(reader.config)
    _check_sizes(checkpoint, architecture)
    root = expert.removesuffix(architecture.expert)
    stems = [layout.stem for layout in architecture.layouts] + [expert.removeprefix(root).partition("{expert}")[0]]
    dense = (found.layers for found in architecture.locate(reader.names, reader.config) if found.root == root)
    moe_layers = set(checkpoint.fmt.layers).union(*dense)
    # Experts' names say that a layer has some; what is beside them is called as it is in a source.
    coded = {own for name in checkpoint.fmt.rest_tensors for own in row_names(name)}
    names = [*(name for name in reader.names if name not in coded), *checkpoint.fmt.rest_tensors]
    check_whole(reader, architecture, root, stems, moe_layers, names)
    tensors = {}
    for name in checkpoint.plain_names:
        in_codes = name in checkpoint.fmt.rest_tensors
        stored = row_names(name)[0] if in_codes else name
        dtype = SAFETENSORS_NAMES[checkpoint.fmt.dtype] if in_codes else reader.dtype(name)
        tensors[name] = PlainTensor(dtype, reader.shape(stored), f"{reader.shard_of(stored)}: {stored!r}")
    hidden = checkpoint.fmt.hidden_size
    return PlainPart(reader.path, reader.config, architecture, hidden, root, frozenset(moe_layers), tensors)


def _check_sizes(checkpoint: ResMoECheckpoint, architecture: MoEArchitecture) -> None:
    """Of a family that is known, config.json and its block say the same; a loader builds the model by the one."""
    fmt = checkpoint.fmt
    found = MoESizes(fmt.num_experts, fmt.hidden_size, fmt.intermediate_size)
    if architecture.known and (said := architecture.sizes(checkpoint.reader.config)) != found:
        raise FormatError(f"{checkpoint.reader.path}: config.json says {said}, its quantization_config {found}")
    if (count := architecture.num_layers(checkpoint.reader.config)) is None:
        return
    decoder, draft = "one of the decoder's", "a draft"
    for layer in fmt.layers:
        expected = draft if layer >= count else decoder
        is_called = decoder if layer in fmt.decoder_layers else draft
        if expected != is_called:
            raise FormatError(
                f"{checkpoint.reader.path}: by config.json, which has {count} layers, layer {layer} is {expected}, its "
                f"quantization_config calls it {is_called}"
            )


def _open_original(path: str | Path | CheckpointFiles, checkpoint: ResMoECheckpoint) -> MoESource:
    if isinstance(path, CheckpointFiles):
        # The checkpoint may come from a directory with files that are not taken from the hub.
        path.take_also(checkpoint.reader.files())
    reader = CheckpointReader(path)
    if (reader.config.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD:
        raise ConfigError(f"--against {path}: is a ResMoE checkpoint; give the original that it was made from")
    return open_source(SourceReader(path), to_copy=False)


def _read_report(path: Path) -> _Report:
    file = path / REPORT_NAME
    if not file.exists():
        return _Report({}, {}, {})
    content = read_json_object(file)
    check_keys(content, REPORT_KEYS, str(file))
    try:
        errors = {layer["layer"]: layer["relative_error"] for layer in content["layers"]}
        checksums, left_out = dict(content.get("shards", {})), dict(content.get("left_out", {}))
    except (ValueError, KeyError, TypeError) as err:
        raise FormatError(f"{file}: not a report of this version: {err!r}") from err
    for layer in content["layers"]:
        check_keys(layer, LAYER_KEYS, f"{file}: layers")
    for name, error in errors.items():
        if not _is_number(error) or error < 0:
            raise FormatError(f"{file}: relative error of layer {name} is {error!r}, expected a number of at least 0")
    for name, checksum in checksums.items():
        if not isinstance(checksum, str) or not is_file_name(name):
            raise FormatError(f"{file}: shards: {name!r}: expected a weight file beside it and its SHA-256")
    return _Report(errors, checksums, left_out)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _as_tensor(spec: TensorSpec, octets: bytearray) -> Tensor:
    """A stored tensor of a dtype and shape that have been checked."""
    if not octets:
        return torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
    return torch.frombuffer(octets, dtype=DTYPES[spec.dtype]).view(spec.shape)


def _check_report(path: Path, verdict: LayerVerdict) -> None:
    found, reported = verdict.relative_error, verdict.reported_relative_error
    if found is None or reported is None:
        return
    if not found <= reported * (1 + REPORT_TOLERANCE) + 1e-9:
        raise FormatError(
            f"{path}: layer {verdict.layer}: relative error against the source is {found:.6g}, "
            f"its report says {reported:.6g}; the weights are not the ones that were written"
        )
