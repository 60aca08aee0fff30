"""A safetensors file looked at from outside: what is in it, whether it is all there, which file it is."""

import hashlib
import json
from pathlib import Path
from typing import Any

from compress_tools.errors import CheckpointError

_SAMPLE_BYTES = 4096
_SAMPLE_EVERY_BYTES = 16 * 2**20


def shard_digest(file: Path) -> str:
    """SHA-256 over size, header and samples of every tensor's data; far cheaper than reading the file.

    Raises:
        CheckpointError: not readable.
    """
    try:
        digest = hashlib.sha256(f"{file.stat().st_size} ".encode())
        with file.open("rb", buffering=0) as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            header = stream.read(header_bytes)
            digest.update(header)
            for _, begin, end in _spans(json.loads(header)):
                last = max(begin, end - _SAMPLE_BYTES)
                for offset in (*range(begin, last, _SAMPLE_EVERY_BYTES), last):
                    stream.seek(8 + header_bytes + offset)
                    digest.update(stream.read(min(_SAMPLE_BYTES, end - offset)))
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{file}: can't read: {err}") from err
    return digest.hexdigest()


def file_checksum(file: Path) -> str:
    """SHA-256 of all of a file, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def first_cut_tensor(file: Path) -> str:
    """A clause that names the first tensor whose data is not all in the file; empty if the header does not say."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            # A damaged length must not become a read of exabytes.
            spans = _spans(json.loads(stream.read(header_bytes))) if header_bytes < size else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    missing = [name for name, _, end in spans if 8 + header_bytes + end > size]
    return f"; {len(missing)} tensors are cut off, first {missing[0]!r}" if missing else ""


def _spans(header: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(name, first byte, byte after the last) of each tensor, by position; bytes count from the header's end."""
    spans = [(name, *entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"]
    return sorted(spans, key=lambda span: span[1:])
