"""Small files written whole, and disks that refuse, said in a sentence."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from compress_tools.errors import CheckpointError
from compress_tools.text_file import in_words

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn a failed write below ``directory`` into a sentence.

    Raises:
        CheckpointError: the file system refuses; where it is full, with the way out.
    """
    try:
        yield
    except (OSError, SafetensorError) as err:
        # safetensors keeps the number of the error in its text alone
        full = any(f"os error {number}" in str(err) or getattr(err, "errno", None) == number for number in _FULL)
        advice = "; make room, then run the same command with --resume" if full else ""
        raise CheckpointError(f"{directory}: can't write: {in_words(err)}{advice}") from err


def write_text(file: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def sync(file: Path) -> None:
    """Wait until a file's content is on the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
