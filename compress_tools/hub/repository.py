"""One commit of a repository on the hub: what is in it, its files in the user's cache, parts of its weight files."""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_tools.errors import CheckpointError
from compress_tools.hub.refusals import asking, endpoint, is_unreachable, offline
from compress_tools.hub.selection import is_code, is_hidden, is_weights, names_code, why_left_out
from compress_tools.progress.listener import ProgressListener, Silent
from compress_tools.source.reader import CONFIG_NAME

# Bytes of a transfer for each step of its progress.
STEP_BYTES = 16 * 2**20
# Without a byte in between.
_TRIES = 5
_CHUNK = 2**20


@dataclass(frozen=True)
class Repository:
    """One commit, its small files in the cache.

    Attributes:
        name: ``ORG/NAME``.
        revision: as asked for.
        commit: that it means.
        path: the commit's folder in the user's cache.
        sizes: bytes of every file, hidden ones left out.
        left_out: files that are not fetched, and why.
        listed: the hub itself told of the files; else the cache did, which may lack some.
    """

    name: str
    revision: str
    commit: str
    path: Path
    sizes: dict[str, int]
    left_out: dict[str, str]
    listed: bool

    @property
    def weights(self) -> list[str]:
        """Files that may be the model's shards, ascending."""
        return sorted(name for name in self.sizes if is_weights(name))

    def cached(self, filename: str) -> Path | None:
        """A file that lies in the user's cache as a whole."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.name, filename, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def fetch(self, filename: str, folder: Path | None = None, progress: ProgressListener | None = None) -> Path:
        """Fetch a file whole, unless it is there.

        Args:
            filename: in the repository.
            folder: where to; by default the user's cache.
            progress: told of a stage and its steps of ``STEP_BYTES``.
        Raises:
            CheckpointError: it can't be had.
        """
        steps = _Steps(progress or Silent(), self.sizes.get(filename, 0))
        with asking(self.name, self.revision, filename, folder):
            found = _download(self.name, filename, self.commit, folder, steps)
        if (size := found.stat().st_size) != self.sizes.get(filename, size):
            found.unlink()
            raise CheckpointError(
                f"{self.name}: {filename} has {size} bytes, {endpoint()} says {self.sizes[filename]}; fetch it again"
            )
        return found

    def read(self, filename: str, first: int, count: int) -> bytearray:
        """Bytes of a file, without the rest; a cut transfer goes on where it was cut.

        Args:
            filename: in the repository.
            first: byte.
            count: bytes; fewer come where the file ends.
        Raises:
            CheckpointError: they can't be had.
        """
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise CheckpointError(offline(self.name, filename))
        count = max(0, min(count, self.sizes.get(filename, first + count) - first))
        content, done, tries = bytearray(count), 0, 0
        with asking(self.name, self.revision, filename):
            while done < count:
                try:
                    for chunk in self._parts(filename, first + done, first + count - 1):
                        taken = chunk[: count - done]
                        content[done : done + len(taken)] = taken
                        done, tries = done + len(taken), 0
                except Exception as err:
                    if not is_unreachable(err):
                        raise
                    tries += 1
                    if tries >= _TRIES:
                        raise
                    time.sleep(min(2 ** (tries - 1), 8))
        return content

    def _parts(self, filename: str, first: int, last: int) -> Iterator[bytes]:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        url = hf_hub_url(self.name, filename, revision=self.commit, endpoint=endpoint())
        headers = {**build_hf_headers(), "Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
        with http_stream_backoff(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, retry_on_exceptions=()
        ) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:
                raise CheckpointError(
                    f"{self.name}: {endpoint()} does not give parts of {filename}; fetch the model with `hf download "
                    f"{self.name} --local-dir DIR`, then name DIR"
                )
            yield from response.iter_bytes(chunk_size=_CHUNK)


def open_repository(name: str, revision: str | None) -> Repository:
    """Find a model on the hub, or in the user's cache where the hub must not or can't be asked; fetch its small files.

    Args:
        name: ``ORG/NAME``.
        revision: branch, tag or commit.
    Raises:
        CheckpointError: there is no such model or revision, it may not be read, or nobody can be asked.
    """
    asked = revision or "main"
    with asking(name, asked):
        # By its branch: the cache remembers which commit that was, for when there is no network.
        config = _config_of(name, asked)
        folder, commit = config.parent, config.parent.name
        if re.fullmatch(r"[0-9a-f]{40}", commit) is None:
            raise CheckpointError(f"{config}: is not where the hub's cache keeps files; check HF_HOME and HF_HUB_CACHE")
        told = _listed(name, commit)
    sizes = _lying_in(folder) if told is None else told
    sizes = {filename: size for filename, size in sizes.items() if not is_hidden(filename)}
    made = Repository(name, asked, commit, folder, sizes, {}, told is not None)
    fetched = [filename for filename in sizes if why_left_out(filename, trusted_code=False) is None]
    small = [filename for filename in fetched if not is_weights(filename)]
    for filename in small:
        made.fetch(filename)
    trusted_code = names_code(_read(folder / filename) for filename in small if filename.endswith(".json"))
    if trusted_code:
        for filename in filter(is_code, sizes):
            made.fetch(filename)
    reasons = {filename: why_left_out(filename, trusted_code=trusted_code) for filename in sizes}
    made.left_out.update({filename: why for filename, why in reasons.items() if why is not None})
    return made


def _config_of(name: str, revision: str) -> Path:
    """config.json in the cache; its folder is named after the commit."""
    from huggingface_hub import errors

    try:
        return _download(name, CONFIG_NAME, revision, None, _Steps(Silent(), 0))
    except errors.RemoteEntryNotFoundError as err:
        raise CheckpointError(
            f"{name}: has no {CONFIG_NAME} on {endpoint()} at revision {revision}; expected a Hugging Face checkpoint"
        ) from err


def _listed(name: str, commit: str) -> dict[str, int] | None:
    """Every file's size by the hub's word; None where it must not or can't be asked."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        info = _patiently(lambda: HfApi(endpoint=endpoint()).model_info(name, revision=commit, files_metadata=True))
    except Exception as err:
        if not is_unreachable(err):
            raise
        return None
    return {file.rfilename: file.size or 0 for file in info.siblings or []}


def _lying_in(folder: Path) -> dict[str, int]:
    """Every file's size of what the cache has."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _patiently(ask: Callable[[], Any]) -> Any:
    """Ask again where the hub is busy."""
    from huggingface_hub.errors import HfHubHTTPError

    for wait_s in (1, 2, 4):
        try:
            return ask()
        except HfHubHTTPError as err:
            if err.response.status_code not in (429, 500, 502, 503, 504):
                raise
            given = err.response.headers.get("Retry-After", "")
            time.sleep(min(int(given), 60) if given.isdecimal() else wait_s)
    return ask()


def _read(file: Path) -> object:
    """A file's JSON; None where it is none, which is another's to say."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _download(name: str, filename: str, revision: str, folder: Path | None, steps: "_Steps") -> Path:
    from huggingface_hub import hf_hub_download

    found = hf_hub_download(
        name,
        filename,
        revision=revision,
        local_dir=folder,
        endpoint=endpoint(),
        tqdm_class=steps.bar(),
        library_name="resmoe",
    )
    return Path(os.fspath(found))


@contextmanager
def quiet_library() -> Iterator[None]:
    """The library's own remarks on each try are left out, unless HF_HUB_VERBOSITY asks for them."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    if "HF_HUB_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


class _Steps:
    """Bytes as steps of a stage; small files are none.

    Args:
        progress: told of them.
        size: of the whole.
    """

    def __init__(self, progress: ProgressListener, size: int) -> None:
        self._progress, self._bytes, self._said = progress, 0, 0
        self._counted: object = None
        if size >= STEP_BYTES:
            progress.stage("fetching", -(-size // STEP_BYTES))

    def add(self, count: int) -> None:
        """So many bytes more."""
        self._bytes += count
        while (self._said + 1) * STEP_BYTES <= self._bytes:
            self._said += 1
            self._progress.step()

    def bar(self) -> Any:
        """A class of bars, as the hub's library takes it, that shows nothing and counts here."""
        from huggingface_hub.utils import tqdm

        steps = self

        class Bar(tqdm):  # type: ignore[misc]  # its base is Any here
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "disable": True})
                # A transfer by xet has two: of bytes that arrive, and of bytes that are written.
                if steps._counted is None:
                    steps._counted = self

            def update(self, n: float | None = 1) -> bool | None:
                if steps._counted is self:
                    steps.add(max(0, int(n or 0)))
                return None

        return Bar
