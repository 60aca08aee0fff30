"""What comes in is what goes out: every tensor and file of a source is accounted for, and nothing else is there."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compress_tools.errors import CheckpointError, FormatError
from compress_tools.format.loading_guard import GUARD_KEY
from compress_tools.output.finish import output_name_of_file
from compress_tools.output.run_record import read_record
from compress_tools.report import CARD_NAME
from compress_tools.source.moe_source import MoESource
from compress_tools.source.other_files import WRITTEN_NAMES
from compress_tools.stored.checkpoint import ResMoECheckpoint
from compress_tools.text_file import in_words

_CHUNK = 2**20
_ABSENT = "nothing"


@dataclass(frozen=True)
class Census:
    """Where the tensors and files of a source went; counts.

    Attributes:
        replaced: tensors in whose place compressed ones stand.
        copied: tensors that are copied; quantised ones decoded.
        written_out: tensors that are a second copy of a source's: an output layer that was tied.
        files: files that are copied.
        left_out: tensors and files that the report names as left out.
        coded: of the copied tensors, those that are stored in codes.
    """

    replaced: int
    copied: int
    written_out: int
    files: int
    left_out: int
    coded: int = 0


def take_census(checkpoint: ResMoECheckpoint, source: MoESource, left_out: Mapping[str, str]) -> Census:
    """Account for every tensor, file and config value. Tensors go by their names; their values are not read.

    Args:
        checkpoint: the ResMoE checkpoint.
        source: what it was made from.
        left_out: the report's account of what is not there.
    Raises:
        FormatError: something of the source is missing, or something is there that is not the source's.
        CheckpointError: a file is not readable.
    """
    path, there = checkpoint.reader.path, source.reader.path
    for name, why in source.left_out().items():
        if name not in left_out:
            raise FormatError(f"{path}: {name!r} of {there} is left out ({why}), and the report does not say so")
    copied = source.copied(checkpoint.fmt.layers)
    plain = set(checkpoint.plain_names)
    if missing := next((name for name in copied if name not in plain), None):
        raise FormatError(f"{path}: {missing!r} of {there} is missing")
    # Of names that the format gives, the checkpoint has been seen to have those of its config alone.
    if extra := next((name for name in checkpoint.plain_names if name not in copied), None):
        raise FormatError(f"{path}: {extra!r} is no tensor of {there}")
    _check_config(checkpoint, source)
    files = _check_files(checkpoint, source, left_out)
    written_out = len(source.written_out())
    replaced = sum(len(source.expected(layer)) for layer in checkpoint.fmt.layers)
    coded = len(checkpoint.fmt.rest_tensors)
    return Census(replaced, len(copied) - written_out, written_out, files, len(source.left_out()), coded)


def _check_config(checkpoint: ResMoECheckpoint, source: MoESource) -> None:
    ours = {key: value for key, value in checkpoint.reader.config.items() if key != "quantization_config"}
    if ours.pop(GUARD_KEY, None) is None:
        raise FormatError(
            f"{checkpoint.reader.path}: config.json has no {GUARD_KEY}, without which transformers loads it as a dense "
            "model; compress again"
        )
    theirs = {key: value for key, value in source.reader.config.items() if key != GUARD_KEY}
    for key in sorted(set(ours) | set(theirs)):
        found, expected = ours.get(key, _ABSENT), theirs.get(key, _ABSENT)
        # By their text: NaN, which JSON of Python holds, differs from itself.
        if json.dumps(found, sort_keys=True, default=str) != json.dumps(expected, sort_keys=True, default=str):
            raise FormatError(
                f"{checkpoint.reader.path}: config.json: {key} is {found!r:.60}; in {source.reader.path} it is "
                f"{expected!r:.60}"
            )


def _check_files(checkpoint: ResMoECheckpoint, source: MoESource, left_out: Mapping[str, str]) -> int:
    path, there = checkpoint.reader.path, source.reader.path
    expected = {output_name_of_file(file.relative_to(there)).as_posix(): file for file in source.reader.other_files()}
    # Made from the hub, of which fewer files are taken than a directory may hold.
    absent = {name for name in expected if name in left_out and not (path / name).exists()}
    expected = {name: file for name, file in expected.items() if name not in absent}
    for name, file in expected.items():
        if not (path / name).is_file():
            raise FormatError(f"{path}: {name} is missing, a file of {there}")
        if not _same(path / name, file):
            raise FormatError(f"{path}: {name} differs from {file}")
    ours = {CARD_NAME, *WRITTEN_NAMES}
    if extra := next((name for name in checkpoint.reader.files() if name not in expected and name not in ours), None):
        raise FormatError(f"{path}: {extra} is no file of {there}; move it away")
    record = read_record(path)
    for name in sorted(record.files) if record is not None else ():
        if name in ours and not (path / name).is_file():
            raise FormatError(f"{path}: {name}, which was written with it, is missing")
    return len(expected)


def _same(first: Path, second: Path) -> bool:
    try:
        if first.stat().st_size != second.stat().st_size:
            return False
        with first.open("rb") as one, second.open("rb") as other:
            return all(chunk == other.read(_CHUNK) for chunk in iter(lambda: one.read(_CHUNK), b""))
    except OSError as err:
        raise CheckpointError(f"{err.filename}: not readable: {in_words(err)}") from err
