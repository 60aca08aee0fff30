"""Tensors to shards, index and config.json in a staging directory, renamed when whole; resumable until then."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from compress_tools.checkpoint_reader import CONFIG_NAME, INDEX_NAME
from compress_tools.errors import CheckpointError

STATE_DIR = ".resmoe-state"


def staging_path(dst: Path) -> Path:
    """Where a checkpoint is put together: beside the destination, so that the last step is a rename."""
    return dst.with_name(dst.name + ".partial")


class CheckpointWriter:
    """Writes one checkpoint directory, all or nothing.

    A shard counts as written once its record exists; records live in the staging directory and hold what the
    report needs of the shard, so that a resumed run makes the same bytes.

    Args:
        dst: the directory to be.
        identity: what determines the output; a staging directory of another identity is refused.
        resume: go on with a staging directory.
        overwrite: replace an existing ``dst`` (at the end) and staging directory (now).
    Raises:
        CheckpointError: ``dst`` is not empty, a staging directory is in the way, or of another identity.
    """

    def __init__(
        self, dst: str | Path, identity: dict[str, Any], *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.dst = Path(dst).absolute()
        self.staging = staging_path(self.dst)
        self._overwrite = overwrite
        if self.dst.exists() and not self.dst.is_dir():
            raise CheckpointError(f"{self.dst}: exists and is not a directory")
        if self.dst.is_dir() and any(self.dst.iterdir()) and not overwrite:
            raise CheckpointError(f"{self.dst}: not empty; choose another directory or pass --overwrite")
        identity_file = self.staging / STATE_DIR / "identity.json"
        if self.staging.exists():
            if resume:
                self._check_identity(identity_file, identity)
            elif overwrite:
                shutil.rmtree(self.staging)
            else:
                raise CheckpointError(
                    f"{self.staging}: an earlier run did not finish; pass --resume to go on, "
                    "or --overwrite to start again"
                )
        with _writing(self.staging):
            identity_file.parent.mkdir(parents=True, exist_ok=True)
            _write_text(identity_file, json.dumps(identity, indent=2, sort_keys=True))

    def record(self, filename: str) -> dict[str, Any] | None:
        """The record of a shard that an earlier run wrote, or None."""
        file = self._record_file(filename)
        if not file.is_file() or not (self.staging / filename).is_file():
            return None
        return json.loads(file.read_text(encoding="utf-8"))

    def write_shard(self, filename: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Write one shard, then its record.

        Raises:
            CheckpointError: the disk is full or fails; what was written so far can be resumed.
        """
        target = self.staging / filename
        temporary = target.with_suffix(".tmp")
        with _writing(self.staging):
            save_file(tensors, temporary, metadata={"format": "pt"})
            # safetensors makes private files; a server often runs as another user.
            temporary.chmod(0o666 & ~_umask())
            _sync(temporary)
            os.replace(temporary, target)
            _write_text(self._record_file(filename), json.dumps(record))

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
        with _writing(self.staging):
            shutil.rmtree(self.staging / STATE_DIR)
            if not self.dst.exists():
                os.replace(self.staging, self.dst)
                return
            replaced = self.dst.with_name(self.dst.name + ".replaced")
            os.replace(self.dst, replaced)
            os.replace(self.staging, self.dst)
            shutil.rmtree(replaced)

    def _record_file(self, filename: str) -> Path:
        return self.staging / STATE_DIR / f"{filename}.json"

    def _check_identity(self, file: Path, identity: dict[str, Any]) -> None:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as err:
            raise CheckpointError(
                f"{self.staging}: not resumable, its identity is unreadable; pass --overwrite"
            ) from err
        expected = json.loads(json.dumps(identity))
        different = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        if different:
            raise CheckpointError(
                f"{self.staging}: was started from another {', '.join(different)}; resume with the same "
                "source, recipe and version, or pass --overwrite to start again"
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
        raise CheckpointError(
            f"{staging}: can't write: {err}; make room, then run the same command with --resume"
        ) from err


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
