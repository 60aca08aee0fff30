"""What a checkpoint's index says of it: no key that is unknown, no sum that is wrong, no file but as it was written."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from compress_tools.errors import FormatError
from compress_tools.output.run_record import (
    CONFIG_KEY,
    RECORD_KEY,
    TEXTS_KEY,
    changed_texts,
    changed_weights,
    read_record,
)
from compress_tools.source.reader import INDEX_NAME, CheckpointReader
from compress_tools.text_file import read_json_object

_TOTAL = "total_size"


def check_index(reader: CheckpointReader) -> None:
    """The index holds what this project writes there, and the bytes of all tensors; without a record it is anybody's.

    Raises:
        FormatError: names the key.
    """
    file = reader.path / INDEX_NAME
    if not file.exists():
        return
    index = read_json_object(file)
    check_keys(index, {"metadata", "weight_map", RECORD_KEY}, str(file))
    record = index.get(RECORD_KEY)
    if record is None:
        return
    if not isinstance(record, dict) or read_record(reader.path) is None:
        raise FormatError(f"{file}: {RECORD_KEY}: expected an object with what it was made from and its files")
    check_keys(record, {"identity", "files", CONFIG_KEY, TEXTS_KEY}, f"{file}: {RECORD_KEY}")
    metadata = index.get("metadata")
    if not isinstance(metadata, dict):
        raise FormatError(f"{file}: metadata: expected an object with {_TOTAL}, found {metadata!r:.60}")
    check_keys(metadata, {_TOTAL}, f"{file}: metadata")
    found, expected = metadata.get(_TOTAL), sum(map(reader.nbytes, reader.names))
    if type(found) is not int or found != expected:
        raise FormatError(f"{file}: metadata: {_TOTAL} is {found!r:.60}, its tensors have {expected} bytes")


def check_keys(content: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Refuse a key that no version writes, with a FormatError that names it."""
    if unknown := sorted(set(content) - set(known)):
        raise FormatError(f"{where}: unknown key {unknown[0]!r:.100}; expected {', '.join(sorted(known))}")


def altered_file(path: Path, said: str = "") -> str | None:
    """A clause that names the first file that is not as it was written, by the index.

    Args:
        path: the checkpoint.
        said: what else is wrong; of weight files, whose headers and samples alone are looked at then, one that follows
            from that.
    Returns:
        None where all are, where the index does not say, or where ``said`` names the file.
    """
    changed = changed_texts(path)
    if said and not changed and (record := read_record(path)) is not None:
        changed = changed_weights(path, record.files)
    name = next(iter(changed), None)
    if name is None or name in said:
        return None
    place = "that it holds" if name == INDEX_NAME else f"in {INDEX_NAME}"
    return f"{name} is not the file that was written: its SHA-256 differs from the one {place}"
