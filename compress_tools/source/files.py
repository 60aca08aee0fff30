"""Where the files of a checkpoint come from: a directory, or what fetches them into one."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.format.shard_file import StoredTensor, read_header, read_tensor, shard_digest
from compress_tools.source.other_files import files_of, why_left_out


class CheckpointFiles:
    """The files of a checkpoint that lies in a directory. What fetches them derives from this.

    Args:
        path: the directory.
    Attributes:
        path: where every file but the weights lies.
        spelled: how the user named the checkpoint.
        origin: repository, revision and commit of a checkpoint that is fetched; empty for a directory.
        streams: weight files are removed again after their last use.
        remarks: what a user should know of where they come from.
    Raises:
        CheckpointError: no directory.
        ConfigError: an empty string.
    """

    origin: Mapping[str, str] = {}
    streams = False
    remarks: Sequence[str] = ()

    def __init__(self, path: str | Path) -> None:
        self.path, self.spelled = Path(path), str(path)
        if not self.spelled:
            raise ConfigError("the checkpoint is an empty string; name a directory (`.` is the present one)")
        if self.path.exists() and not self.path.is_dir():
            kind = "a file" if self.path.is_file() else "no directory"
            raise CheckpointError(f"{self.path}: is {kind}; expected the directory of a Hugging Face checkpoint")
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: no such directory; {expected(self.spelled)}")

    def __str__(self) -> str:
        return self.spelled

    def names(self) -> list[str]:
        """All files, see ``other_files.files_of``."""
        return files_of(self.path)

    def why_left_out(self, name: str) -> str | None:
        """Why a file that is not config, index or weights of the checkpoint is not copied through; None for others."""
        return why_left_out(self.path, name)

    def take_also(self, names: Iterable[str]) -> None:
        """Have these files here too, if they are among those that are usually not fetched.

        Raises:
            CheckpointError: they can't be had.
        """

    def beside_config(self) -> list[str]:
        """Everything that lies beside config.json, weights among it, ascending."""
        return sorted(entry.name for entry in self.path.iterdir())

    def local(self, shard: str) -> Path | None:
        """A weight file that lies here as a whole; None: read parts of it."""
        return self.path / shard

    def header(self, shard: str) -> dict[str, StoredTensor]:
        """A weight file's tensors.

        Raises:
            CheckpointError: not readable.
        """
        return read_header(self.path / shard)

    def read(self, shard: str, tensor: StoredTensor, begin: int = 0, end: int | None = None) -> bytearray:
        """Bytes of a tensor of a weight file.

        They are read, not mapped: the system ends a process that looks at a mapped page of a file that was cut since.

        Args:
            shard: its file.
            tensor: what the header says of it.
            begin: first byte, counted from the tensor's.
            end: the byte after the last; None: all.
        Raises:
            CheckpointError, OSError, ValueError: they can't be had.
        """
        return read_tensor(self.local(shard) or self.path / shard, tensor, begin, end)

    def identity(self, shards: Iterable[str]) -> dict[str, str]:
        """What tells this checkpoint's weights from another's.

        Raises:
            CheckpointError: a shard is not readable.
        """
        return {shard: shard_digest(self.path / shard) for shard in shards}

    def prepare(self, shards: Iterable[str]) -> None:
        """A run will read these weight files: get them now, unless they are to be removed again.

        Raises:
            CheckpointError: they can't be had.
        """

    def need(self, wanted: Mapping[str, int], *, partly: Collection[str] = ()) -> None:
        """The next reads are of these weight files, and of no others.

        Args:
            wanted: by weight file, how many bytes of it.
            partly: files that need not be here as a whole for a part of them.
        Raises:
            CheckpointError: they can't be had.
        """

    def disk_bytes(self, steps: Iterable[Iterable[str]]) -> int:
        """Bytes that weight files will take on the disk at one time, when each step needs some of them."""
        del steps
        return 0

    def close(self, *, finished: bool) -> None:
        """Nothing more will be read.

        Args:
            finished: the run is done, and nothing is kept for another try.
        """


def expected(spelled: str) -> str:
    """What a source may be, for a message that says that it is none."""
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", spelled) is not None
    if named:
        return f"expected a Hugging Face checkpoint directory; `hf download {spelled} --local-dir DIR` makes one"
    return "expected a Hugging Face checkpoint directory, or a model of the hub as ORG/NAME"
