"""A folder of weight files that one run fetched for itself; nothing else in it, or anywhere, is removed."""

import fcntl
import glob
import json
import os
import shutil
from pathlib import Path
from typing import Any

from compress_tools.errors import CheckpointError
from compress_tools.format.shard_file import is_file_name
from compress_tools.hub.repository import Repository
from compress_tools.progress.listener import ProgressListener

# Says whose folder it is, and what may lie in it.
MARKER_NAME = "resmoe_source.json"
# What the hub's library keeps of files that it put into a folder.
_LIBRARY_DIR = Path(".cache", "huggingface")


class OwnFolder:
    """Weight files of one commit, fetched to be removed; made when the first one comes.

    Args:
        path: the folder; one that an earlier run of the same commit left is gone on with.
        repository: the commit.
        progress: told of what is removed, and of fetching.
    Raises:
        CheckpointError: something else lies there, or another process fetches into it.
    """

    def __init__(self, path: Path, repository: Repository, progress: ProgressListener) -> None:
        self.path, self._repository, self._progress = path, repository, progress
        self._held: int | None = None
        # The marker of an earlier run of another commit, until something is fetched.
        self._stale: dict[str, Any] | None = None
        if os.path.lexists(path):
            self._take_over()

    def holds(self, shard: str) -> Path | None:
        """A weight file that is there as a whole."""
        file = self.path / shard
        if self._held is None or self._stale is not None or not file.is_file():
            return None
        return file if file.stat().st_size == self._repository.sizes.get(shard) else None

    def fetch(self, shard: str) -> None:
        """Fetch a weight file.

        Raises:
            CheckpointError: it can't be had, or the disk is full.
        """
        if self._held is None:
            self._make()
        self._discard_stale()
        self._repository.fetch(shard, self.path, self._progress)

    def keep_only(self, wanted: set[str]) -> None:
        """Remove every other weight file."""
        if self._held is not None and self._stale is None:
            for shard in self._repository.weights:
                if shard not in wanted:
                    self._remove(shard)

    def close(self, *, finished: bool) -> None:
        """Let others fetch into the folder.

        Args:
            finished: remove what was fetched; else it is kept for another try.
        """
        if self._held is None:
            return
        if finished:
            self._discard_stale()
        if self._stale is None and (finished or not any(map(self.holds, self._repository.weights))):
            self._clear()
        os.close(self._held)
        self._held = None

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._hold()
            self._mark()
        except OSError as err:
            raise CheckpointError(f"{self.path}: weight files can't be fetched there: {err.strerror}") from err

    def _mark(self) -> None:
        own = {"repository": self._repository.name, "commit": self._repository.commit}
        content = json.dumps({**own, "files": self._repository.weights}, indent=2)
        temporary = self.path / f"{MARKER_NAME}.tmp"
        temporary.write_text(content + "\n", encoding="utf-8")
        temporary.replace(self.path / MARKER_NAME)

    def _take_over(self) -> None:
        """Go on with a folder that is there, if it is such a folder."""
        marker = self._marker()
        if marker is None:
            if self.path.is_dir() and not any(self.path.iterdir()):
                return
            raise CheckpointError(
                f"{self.path}: weight files are to be fetched there, but it holds what resmoe did not; move it away"
            )
        self._hold()
        own = {"repository": self._repository.name, "commit": self._repository.commit}
        # Of a transfer that was killed; it can't be gone on with.
        for left in (self.path / _LIBRARY_DIR).rglob("*.incomplete"):
            left.unlink()
        if {key: marker.get(key) for key in own} != own:
            self._stale = marker

    def _discard_stale(self) -> None:
        """Remove what an earlier run of another commit fetched: now that this run is known to go on."""
        if self._stale is None:
            return
        marker, self._stale = self._stale, None
        files = [name for name in marker["files"] if is_file_name(name)]
        if any((self.path / name).exists() for name in files):
            self._progress.say(
                f"{self.path}: weight files of {marker.get('repository')} at commit {marker.get('commit')}, which an "
                f"earlier run fetched, are removed; the commit is {self._repository.commit} now"
            )
        for name in files:
            self._remove(name)
        self._mark()

    def _marker(self) -> dict[str, Any] | None:
        try:
            content = json.loads((self.path / MARKER_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) and isinstance(content.get("files"), list) else None

    def _hold(self) -> None:
        """Keep other processes out; on a file system without locks nothing is held."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise CheckpointError(
                f"{self.path}: another process fetches weight files into it; wait for it, or choose another destination"
            ) from None
        except OSError:
            pass
        self._held = descriptor

    def _remove(self, shard: str) -> None:
        (self.path / shard).unlink(missing_ok=True)
        for note in (self.path / _LIBRARY_DIR / "download").glob(f"{glob.escape(shard)}.*"):
            note.unlink(missing_ok=True)

    def _clear(self) -> None:
        for shard in self._repository.weights:
            self._remove(shard)
        shutil.rmtree(self.path / _LIBRARY_DIR, ignore_errors=True)
        (self.path / MARKER_NAME).unlink(missing_ok=True)
        try:
            for folder in (self.path / _LIBRARY_DIR).parent, self.path:
                folder.rmdir()
        except OSError:
            self._progress.say(f"{self.path}: is kept, as it holds what resmoe did not fetch")
