"""Tensors to shards, index and config.json in a staging directory, renamed when whole; resumable until then."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from compress_tools.errors import CheckpointError
from compress_tools.format.shard_file import file_checksum
from compress_tools.output.files import sync, write_text, writing
from compress_tools.output.run_record import RECORD_KEY, RunRecord, digested_texts, make_record, with_own_digest
from compress_tools.output.staging import Staging
from compress_tools.source.reader import CONFIG_NAME, INDEX_NAME


class CheckpointWriter:
    """Writes one checkpoint directory, all or nothing; a context, within which no other process may write it.

    A shard counts as written once its record exists; records live in the staging directory and hold what the
    report needs of the shard, so that a resumed run makes the same bytes.

    Args:
        dst: the directory to be; see ``Staging``.
        identity: what determines the output; a staging directory of another identity is refused.
        resume: go on with a staging directory; it keeps its own permission to replace ``dst``.
        overwrite: replace an existing ``dst`` (at the end) and staging directory (now).
    Attributes:
        identity: of the run that is gone on with, else as given.
        is_finished: ``dst`` is this very output already; nothing is left to do.
    Raises:
        CheckpointError: ``dst`` is not empty, can't be renamed to, or a staging directory is in the way, of another
            identity, or being written by another process.
    """

    def __init__(
        self, dst: str | Path, identity: dict[str, Any], *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self._output = Staging(dst)
        self.identity: dict[str, Any] = {}
        self.is_finished = False
        try:
            self.identity, self.is_finished = self._output.open(identity, resume=resume, overwrite=overwrite)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write the directory."""
        self._output.close()

    @property
    def dst(self) -> Path:
        """The directory to be, absolute and without links."""
        return self._output.dst

    @property
    def staging(self) -> Path:
        """Where the output is put together."""
        return self._output.path

    @property
    def replaced_working_directory(self) -> bool:
        """This process stood in ``dst`` when it was replaced, and was moved to the new one."""
        return self._output.replaced_working_directory

    def record(self, filename: str) -> dict[str, Any] | None:
        """The record of a shard that an earlier run wrote whole, or None.

        ``bytes`` is the file's size, ``sha256`` its checksum.
        """
        file = self._record_file(filename)
        shard = self.staging / filename
        if not file.is_file() or not shard.is_file():
            return None
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if record["bytes"] != shard.stat().st_size:
            return None
        with writing(self.staging):
            # A crash of the machine can lose a note that was written before the file.
            self._output.note(filename)
        return record

    def write_shard(self, filename: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> dict[str, Any]:
        """Write one shard, then its record.

        Returns:
            the record as written.
        Raises:
            CheckpointError: the disk is full or fails; what was written so far can be resumed.
        """
        temporary = (self.staging / filename).with_suffix(".tmp")
        with writing(self.staging):
            self._output.note(filename)
            save_file(tensors, temporary, metadata={"format": "pt"})
            # safetensors makes private files; a server often runs as another user.
            temporary.chmod(0o666 & ~_umask())
            sync(temporary)
            checksum = file_checksum(temporary)
            os.replace(temporary, self.staging / filename)
            return self._write_record(filename, {**record, "sha256": checksum})

    def take_shard(self, source: Path, filename: str, record: dict[str, Any]) -> None:
        """Make a shard that lies elsewhere part of this checkpoint, then write its record.

        The file is linked; where the file system can't, it is copied. ``source`` stays.

        Raises:
            CheckpointError: the disk is full or fails; what was taken so far can be resumed.
        """
        temporary = (self.staging / filename).with_suffix(".tmp")
        with writing(self.staging):
            self._output.note(filename)
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)
                sync(temporary)
            os.replace(temporary, self.staging / filename)
            # Renaming one link of a file to another does nothing: a killed call had linked it already.
            temporary.unlink(missing_ok=True)
            self._write_record(filename, record)

    def write_text(self, filename: str, text: str) -> None:
        """Write a small file."""
        with writing(self.staging):
            self._output.note(filename)
            write_text(self.staging / filename, text)

    def write_json(self, filename: str, content: Any) -> None:
        """Write a JSON file."""
        self.write_text(filename, json_text(content))

    def copy_file(self, source: Path, relative: Path) -> None:
        """Copy a file through, untouched."""
        with writing(self.staging):
            self._output.note(relative.as_posix())
            (self.staging / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, self.staging / relative)

    def finish(self, config: dict[str, Any], shards: dict[str, tuple[str, ...]], total_bytes: int) -> None:
        """Write index and config.json, then rename the staging directory to the destination.

        Args:
            config: content of config.json.
            shards: tensor names by shard file.
            total_bytes: bytes of all tensors.
        """
        text = json_text(config)
        weight_map = {name: filename for filename, names in shards.items() for name in names}
        record = self.run_record(INDEX_NAME, CONFIG_NAME).content() | digested_texts(self.staging, text)
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
            RECORD_KEY: record,
        }
        self.write_text(INDEX_NAME, with_own_digest(index, json_text))
        self.write_text(CONFIG_NAME, text)
        self.publish()

    def run_record(self, *more: str) -> RunRecord:
        """What the output says of its own making.

        Args:
            more: files that are still to be written.
        """
        written = {name for name in self._output.noted() if (self.staging / name).exists()}
        return make_record(self.identity, self.staging, written | set(more))

    def publish(self) -> None:
        """Rename the staging directory to the destination."""
        with writing(self.staging):
            self._output.publish()

    def _record_file(self, filename: str) -> Path:
        return self._output.state / f"{filename}.json"

    def _write_record(self, filename: str, record: dict[str, Any]) -> dict[str, Any]:
        whole = {**record, "bytes": (self.staging / filename).stat().st_size}
        write_text(self._record_file(filename), json.dumps(whole))
        return whole


def check_space(writer: CheckpointWriter, shard_bytes: int, files: dict[Path, Path]) -> None:
    """Refuse to begin what can't be finished.

    Args:
        writer: opened; leftovers of a killed write are gone.
        shard_bytes: bytes of the shards that are still to be written.
        files: files that will be copied through: relative output path to source path.
    Raises:
        CheckpointError: the file system has fewer free bytes.
    """
    copied = sum(file.stat().st_size for relative, file in files.items() if not (writer.staging / relative).is_file())
    needed, free = shard_bytes + copied, free_bytes(writer.staging)
    if needed > free:
        raise CheckpointError(
            f"{writer.dst}: needs {needed} bytes more, {free} are free; make room, then run again with --resume"
        )


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that will hold ``path``."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def json_text(content: Any) -> str:
    """A JSON file's text."""
    return json.dumps(content, indent=2) + "\n"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
