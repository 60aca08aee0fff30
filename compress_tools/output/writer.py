"""Tensors to shards, index and config.json in a staging directory, renamed when whole; resumable until then."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from compress_tools.errors import CheckpointError
from compress_tools.format.shard_file import file_checksum
from compress_tools.output.staging import (
    IDENTITY_NAME,
    MAY_REPLACE_NAME,
    REPLACED_NAME,
    STATE_DIR,
    check_destination,
    check_identity,
    destination,
    discard,
    hold,
    is_occupied,
    is_published,
    publish,
    staging_path,
    tidy,
)
from compress_tools.source.reader import CONFIG_NAME, INDEX_NAME

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointWriter:
    """Writes one checkpoint directory, all or nothing; a context, within which no other process may write it.

    A shard counts as written once its record exists; records live in the staging directory and hold what the
    report needs of the shard, so that a resumed run makes the same bytes.

    Args:
        dst: the directory to be.
        identity: what determines the output; a staging directory of another identity is refused.
        resume: go on with a staging directory; it keeps its own permission to replace ``dst``.
        overwrite: replace an existing ``dst`` (at the end) and staging directory (now).
    Attributes:
        identity: of the run that is gone on with, else as given.
        is_whole: an earlier run, killed while it tidied up, had written everything; nothing is left to do.
    Raises:
        CheckpointError: ``dst`` is not empty, can't be renamed to, or a staging directory is in the way, of another
            identity, or being written by another process.
    """

    def __init__(
        self, dst: str | Path, identity: dict[str, Any], *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.dst = destination(dst)
        self.staging = staging_path(self.dst)
        # As it comes back from a file, so that a resumed run writes the same.
        self.identity: dict[str, Any] = json.loads(json.dumps(identity, sort_keys=True))
        self.is_whole = False
        self._state = self.staging / STATE_DIR
        self._held: int | None = None
        try:
            self._open(identity, resume, overwrite)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write the directory."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _open(self, identity: dict[str, Any], resume: bool, overwrite: bool) -> None:
        check_destination(self.dst)
        if is_published(self.dst):
            self._held = hold(self.dst)
            self.is_whole = resume
            if resume and (self.dst / STATE_DIR / IDENTITY_NAME).exists():
                check_identity(self.dst, identity)
            with _writing(self.dst):
                tidy(self.dst)
            if resume:
                return
            self.close()
        self._may_replace = overwrite or (resume and (self._state / MAY_REPLACE_NAME).exists())
        if is_occupied(self.dst) and not self._may_replace:
            raise CheckpointError(f"{self.dst}: not empty; choose another directory or pass --overwrite")
        if self.staging.exists():
            self._held = hold(self.staging)
            if resume:
                self.identity = check_identity(self.staging, identity) or self.identity
            elif overwrite:
                with _writing(self.staging):
                    discard(self.staging, self.dst)
                self.close()
            else:
                self._refuse_unfinished()
        with _writing(self.staging):
            self._state.mkdir(parents=True, exist_ok=True)
            if self._held is None:
                self._held = hold(self.staging)
            for leftover in (*self.staging.glob("*.tmp"), *self._state.glob("*.tmp")):
                leftover.unlink()
            _write_text(self._state / IDENTITY_NAME, json.dumps(self.identity, indent=2, sort_keys=True))
            if self._may_replace:
                (self._state / MAY_REPLACE_NAME).touch()

    def record(self, filename: str) -> dict[str, Any] | None:
        """The record of a shard that an earlier run wrote whole, or None.

        ``bytes`` is the file's size, ``sha256`` its checksum.
        """
        file = self._record_file(filename)
        shard = self.staging / filename
        if not file.is_file() or not shard.is_file():
            return None
        record = json.loads(file.read_text(encoding="utf-8"))
        return record if record["bytes"] == shard.stat().st_size else None

    def write_shard(self, filename: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> dict[str, Any]:
        """Write one shard, then its record.

        Returns:
            the record as written.
        Raises:
            CheckpointError: the disk is full or fails; what was written so far can be resumed.
        """
        temporary = (self.staging / filename).with_suffix(".tmp")
        with _writing(self.staging):
            save_file(tensors, temporary, metadata={"format": "pt"})
            # safetensors makes private files; a server often runs as another user.
            temporary.chmod(0o666 & ~_umask())
            _sync(temporary)
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
        with _writing(self.staging):
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)
                _sync(temporary)
            os.replace(temporary, self.staging / filename)
            # Renaming one link of a file to another does nothing: a killed call had linked it already.
            temporary.unlink(missing_ok=True)
            self._write_record(filename, record)

    def write_text(self, filename: str, text: str) -> None:
        """Write a small file."""
        with _writing(self.staging):
            _write_text(self.staging / filename, text)

    def write_json(self, filename: str, content: Any) -> None:
        """Write a JSON file."""
        self.write_text(filename, json.dumps(content, indent=2) + "\n")

    def copy_file(self, source: Path, relative: Path) -> None:
        """Copy a file through, untouched."""
        with _writing(self.staging):
            (self.staging / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, self.staging / relative)

    def finish(self, config: dict[str, Any], shards: dict[str, tuple[str, ...]], total_bytes: int) -> None:
        """Write index and config.json, then rename the staging directory to the destination.

        Args:
            config: content of config.json.
            shards: tensor names by shard file.
            total_bytes: bytes of all tensors.
        """
        weight_map = {name: filename for filename, names in shards.items() for name in names}
        self.write_json(
            INDEX_NAME,
            {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))},
        )
        self.write_json(CONFIG_NAME, config)
        self.publish()

    def publish(self) -> None:
        """Rename the staging directory to the destination."""
        with _writing(self.staging):
            publish(self.staging, self.dst, may_replace=self._may_replace)

    def _record_file(self, filename: str) -> Path:
        return self._state / f"{filename}.json"

    def _write_record(self, filename: str, record: dict[str, Any]) -> dict[str, Any]:
        whole = {**record, "bytes": (self.staging / filename).stat().st_size}
        _write_text(self._record_file(filename), json.dumps(whole))
        return whole

    def _refuse_unfinished(self) -> None:
        replaced = self._state / REPLACED_NAME
        kept = f" (the checkpoint that it replaces is safe in {replaced})" if replaced.exists() else ""
        raise CheckpointError(
            f"{self.staging}: an earlier run did not finish{kept}; pass --resume to go on, "
            "or --overwrite to start again"
        )


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


@contextlib.contextmanager
def _writing(staging: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as err:
        # safetensors keeps the number of the error in its text alone
        full = any(f"os error {number}" in str(err) or getattr(err, "errno", None) == number for number in _FULL)
        advice = "; make room, then run the same command with --resume" if full else ""
        raise CheckpointError(f"{staging}: can't write: {err}{advice}") from err


def _write_text(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
