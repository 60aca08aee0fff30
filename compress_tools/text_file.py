"""A text file that was not written by this process: read whole, or one sentence why not."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress_tools.errors import CheckpointError, ResMoEError

# The largest text that is read: an index of a million tensors is a tenth of it.
MOST_BYTES = 2**30
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_text(
    file: str | Path,
    error: Callable[[str], ResMoEError] = CheckpointError,
    where: str | None = None,
    *,
    may_be_piped: bool = False,
) -> str:
    """Read UTF-8 text.

    Args:
        file: the file.
        error: kind of error that is raised.
        where: names the file in the error, such as an option with its value; by default its path.
        may_be_piped: whether it may be a pipe, and of any size, as a user may name one; else a regular file of at most
            ``MOST_BYTES``: a pipe would be waited for, a device has no end.
    Raises:
        ResMoEError: of kind ``error``: missing, no regular file, unreadable, too large, a Git LFS pointer, or not
            UTF-8.
    """
    where = where or str(file)
    try:
        status = os.stat(file)
        if not (may_be_piped or stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise error(f"{where}: is a pipe or a device; expected a text file")
        if status.st_size > MOST_BYTES and not may_be_piped:
            raise error(f"{where}: is {status.st_size} bytes long; expected a text file of at most {MOST_BYTES}")
        content = Path(file).read_bytes()
    except OSError as err:
        raise error(f"{where}: not readable: {in_words(err)}; expected a text file") from err
    if content.startswith(_LFS_POINTER):
        raise error(f"{where}: {lfs_advice(Path(file))}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as err:
        raise error(f"{where}: is not text in UTF-8: byte {err.start} is {content[err.start]:#04x}") from err


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: not readable, or not a JSON object.
    """
    text = read_text(file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{file}: is not JSON: {in_words(err)}") from err
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def is_lfs_pointer(file: Path) -> bool:
    """Whether a readable file holds Git LFS's note on a file instead of the file."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False


def lfs_advice(file: Path) -> str:
    """A clause that says what is there instead of the file, and the way out."""
    return f"is a Git LFS pointer, not the file itself; run `git lfs pull` in {file.parent}, or download it again"


def in_words(err: Exception) -> str:
    """An error of the operating system, or of a parser, as a clause without its number."""
    if isinstance(err, RecursionError):
        return "nested too deeply"
    if isinstance(err, OSError) and err.strerror:
        return err.strerror[0].lower() + err.strerror[1:]
    return " ".join(str(err).split())
