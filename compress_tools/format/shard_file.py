"""A safetensors file looked at from outside: what is in it, whether it is all there, which file it is."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from compress_tools.errors import CheckpointError
from compress_tools.text_file import in_words

_SAMPLE_BYTES = 4096
_SAMPLE_EVERY_BYTES = 16 * 2**20
_CUT = "it ends too early"


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says of a tensor.

    Attributes:
        dtype: as safetensors spells it: ``BF16``, ``U8``, ...
        shape: sizes.
        begin: first byte, counted from the header's end.
        end: the byte after the last.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.end - self.begin


def is_file_name(name: object) -> bool:
    """Whether a name read from a file names something beside that file, and nothing elsewhere."""
    return isinstance(name, str) and re.fullmatch(r"[\w .+-]{1,200}", name) is not None and name.strip(".") != ""


def read_header(file: Path) -> dict[str, StoredTensor]:
    """A file's tensors by name, in the order in which they lie.

    Raises:
        CheckpointError: not readable.
    """
    try:
        with file.open("rb", buffering=0) as stream:
            return parse_header(_header(stream, file.stat().st_size))
    except (OSError, ValueError) as err:
        raise _unreadable(file, err) from err


def read_tensor(file: Path, stored: StoredTensor, begin: int = 0, end: int | None = None) -> bytearray:
    """Bytes of a tensor, or a part of them.

    Args:
        file: the file.
        stored: what its header says of the tensor.
        begin: first byte, counted from the tensor's.
        end: the byte after the last; None: all.
    Raises:
        OSError: not readable.
        ValueError: shorter than its header said.
    """
    with file.open("rb", buffering=0) as stream:
        # A size that is written in the file is not asked of memory before it is known to be there.
        size = os.fstat(stream.fileno()).st_size
        first = 8 + int.from_bytes(stream.read(8), "little") + stored.begin + begin
        count = (stored.nbytes if end is None else end) - begin
        if first + count > size:
            raise ValueError(_CUT)
        stream.seek(first)
        return _read_all(stream, count)


def _read_all(stream: FileIO, count: int) -> bytearray:
    """So many bytes.

    Raises:
        ValueError: there are fewer.
    """
    content = bytearray(max(count, 0))
    left = memoryview(content)
    while left:
        # One call gives at most 2 GiB.
        if not (got := stream.readinto(left)):
            raise ValueError(_CUT)
        left = left[got:]
    return content


def shard_digest(file: Path) -> str:
    """SHA-256 over size, header and samples of every tensor's data; far cheaper than reading the file.

    Raises:
        CheckpointError: not readable.
    """
    try:
        size = file.stat().st_size
        digest = hashlib.sha256(f"{size} ".encode())
        with file.open("rb", buffering=0) as stream:
            header = _header(stream, size)
            digest.update(header)
            for stored in parse_header(header).values():
                begin, end = stored.begin, stored.end
                last = max(begin, end - _SAMPLE_BYTES)
                for offset in (*range(begin, last, _SAMPLE_EVERY_BYTES), last):
                    stream.seek(8 + len(header) + offset)
                    digest.update(stream.read(min(_SAMPLE_BYTES, end - offset)))
    except (OSError, ValueError) as err:
        raise _unreadable(file, err) from err
    return digest.hexdigest()


def file_checksum(file: Path) -> str:
    """SHA-256 of all of a file, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class SinglePass:
    """One sequential read of a whole file: iterate over its tensors' bytes, then ask for its checksum.

    Hashing a file and mapping it afterwards would read it twice wherever it does not stay in the page cache. One tensor
    is in memory at a time, besides those that the caller keeps.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[tuple[str, StoredTensor, bytearray]]:
        """Name, header entry and bytes of each tensor, in the order in which they lie.

        Raises:
            CheckpointError: not readable.
        """
        try:
            with self._file.open("rb", buffering=0) as stream:
                size = self._file.stat().st_size
                header = _header(stream, size)
                self._digest.update(len(header).to_bytes(8, "little") + header)
                position = 0
                for name, stored in parse_header(header).items():
                    if stored.begin != position:
                        raise ValueError(f"{name!r} does not begin where the tensor before it ends")
                    position = stored.end
                    yield name, stored, self._read(stream, stored.nbytes)
                self._read(stream, size - 8 - len(header) - position)
        except (OSError, ValueError) as err:
            raise _unreadable(self._file, err) from err

    @property
    def checksum(self) -> str:
        """SHA-256 of all that was read, in hexadecimal digits: of the file, once the iteration has ended."""
        return self._digest.hexdigest()

    def _read(self, stream: FileIO, count: int) -> bytearray:
        content = _read_all(stream, count)
        self._digest.update(content)
        return content


def first_cut_tensor(file: Path) -> str:
    """A clause that names the first tensor whose data is not all in the file; empty if the header does not say."""
    try:
        size = file.stat().st_size
        with file.open("rb", buffering=0) as stream:
            header = _header(stream, size)
            tensors = parse_header(header)
    except (OSError, ValueError):
        return ""
    missing = [name for name, stored in tensors.items() if 8 + len(header) + stored.end > size]
    return f"; {len(missing)} tensors are cut off, first {missing[0]!r}" if missing else ""


def _header(stream: FileIO, size: int) -> bytes:
    """The header's JSON text; the stream stands behind it."""
    count = int.from_bytes(stream.read(8), "little")
    # A damaged length must not become a read of exabytes.
    if count > size - 8:
        raise ValueError("its header is cut off")
    return stream.read(count)


def parse_header(header: bytes) -> dict[str, StoredTensor]:
    """The tensors by name that a header's JSON text tells of, in the order in which they lie.

    Raises:
        ValueError: it is damaged.
    """
    try:
        found = [(name, _stored_tensor(entry)) for name, entry in json.loads(header).items() if name != "__metadata__"]
    except (KeyError, TypeError, AttributeError, RecursionError) as err:
        raise ValueError(f"its header is damaged: {err!r}") from err
    return dict(sorted(found, key=lambda item: (item[1].begin, item[1].end)))


def _stored_tensor(entry: Any) -> StoredTensor:
    """A header's entry.

    Raises:
        KeyError, TypeError, ValueError: it is damaged.
    """
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    counts = [*shape, begin, end]
    if not isinstance(dtype, str) or not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        raise ValueError(f"its header is damaged: {entry!s:.100}")
    return StoredTensor(dtype, tuple(shape), begin, end)


def _unreadable(file: Path, err: Exception) -> CheckpointError:
    return CheckpointError(f"{file}: can't be read: {in_words(err)}")
