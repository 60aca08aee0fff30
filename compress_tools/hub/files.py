"""A model of the hub as a reader's files: small ones in the cache, weights whole when they are needed, or in part."""

import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.format.shard_file import StoredTensor, parse_header
from compress_tools.hub.own_folder import OwnFolder
from compress_tools.hub.refusals import endpoint, offline
from compress_tools.hub.repository import Repository, open_repository, quiet_library
from compress_tools.hub.selection import NOT_NAMED, is_weights
from compress_tools.progress.listener import ProgressListener, Silent
from compress_tools.progress.text import human_bytes
from compress_tools.source.files import CheckpointFiles

# Most headers are shorter. What comes behind one is kept: small tensors lie there, such as the shapes of packed ones.
_HEADER_BYTES = 256 * 2**10
# What safetensors itself takes for a header.
_MOST_HEADER_BYTES = 100_000_000
# So many headers are asked for at one time.
_HEADERS_AT_ONCE = 8
# Tensors that are smaller are read with what lies behind them.
# Of a weight file, to be fetched whole where a part would do.
_MOSTLY = 0.9
_SMALL_BYTES, _WINDOW_BYTES = 4 * 2**10, 256 * 2**10


class HubFiles(CheckpointFiles):
    """The files of one commit.

    Args:
        repository: the commit.
        progress: told of fetching.
        folder: where weight files go and are removed from; None: they go to the user's cache, and stay.
    """

    def __init__(
        self, repository: Repository, progress: ProgressListener | None = None, folder: Path | None = None
    ) -> None:
        super().__init__(repository.path)
        self.spelled = repository.name
        self.origin = {
            "repository": repository.name,
            "revision": repository.revision,
            "commit": repository.commit,
        }
        self.streams = folder is not None
        self.remarks = [f"{repository.name} at commit {repository.commit} ({repository.revision})"]
        if not repository.listed:
            self.remarks.append("the hub is not asked, or can't be reached: what its cache has is taken")
        self._repository, self._progress = repository, progress or Silent()
        self._folder = None if folder is None else OwnFolder(folder, repository, self._progress)
        self._in_cache: dict[str, Path | None] = {}
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        # By shard: where its data begin, and some bytes that were read, with the place of the first.
        self._data: dict[str, int] = {}
        self._windows: dict[str, tuple[int, bytearray]] = {}
        self._asked: dict[str, Future[dict[str, StoredTensor]]] = {}

    def names(self) -> list[str]:
        """All files of the commit, ascending; hidden ones are left out."""
        return sorted(self._repository.sizes)

    def why_left_out(self, name: str) -> str | None:
        """Why a file was not fetched, or is not copied through."""
        if is_weights(name):
            return NOT_NAMED
        return self._repository.left_out.get(name) or super().why_left_out(name)

    def take_also(self, names: Iterable[str]) -> None:
        """Fetch files that are usually left out."""
        for name in self._repository.left_out.keys() & set(names):
            self._repository.fetch(name)
            del self._repository.left_out[name]

    def beside_config(self) -> list[str]:
        """Files of the repository's top folder, ascending."""
        return sorted(name for name in self._repository.sizes if "/" not in name and _may_be_read(name))

    def local(self, shard: str) -> Path | None:
        """A weight file in the run's own folder or in the user's cache."""
        if self._folder is not None and (own := self._folder.holds(shard)) is not None:
            return own
        if shard not in self._in_cache:
            self._in_cache[shard] = self._repository.cached(shard)
        return self._in_cache[shard]

    def header(self, shard: str) -> dict[str, StoredTensor]:
        """A weight file's tensors, of which nothing else is fetched."""
        if shard not in self._headers:
            if self.local(shard) is None and shard not in self._asked:
                self._ask_for_headers(shard)
            self._headers[shard] = self._fetched_header(shard) if shard in self._asked else self._own_header(shard)
        return self._headers[shard]

    def read(self, shard: str, tensor: StoredTensor, begin: int = 0, end: int | None = None) -> bytearray:
        """Bytes of a tensor, from the hub where its file is not here; see the base class."""
        if self.local(shard) is not None:
            return super().read(shard, tensor, begin, end)
        first = self._data[shard] + tensor.begin + begin
        count = (tensor.nbytes if end is None else end) - begin
        if count > _SMALL_BYTES:
            octets = self._repository.read(shard, first, count)
        else:
            start, window = self._windows.get(shard, (0, bytearray()))
            if not start <= first <= first + count <= start + len(window):
                start, window = first, self._repository.read(shard, first, max(count, _WINDOW_BYTES))
                self._windows[shard] = start, window
            octets = window[first - start : first - start + count]
        if len(octets) < count:
            raise CheckpointError(f"{self}: {shard} ends before its tensors do; tell the model's makers")
        return octets

    def identity(self, shards: Iterable[str]) -> dict[str, str]:
        """The commit, by which every byte is known."""
        del shards
        return {"repository": self._repository.name, "commit": self._repository.commit}

    def prepare(self, shards: Iterable[str]) -> None:
        """Fetch weight files to the cache, unless they are streamed."""
        if not self.streams:
            self._fetch([shard for shard in shards if self.local(shard) is None])

    def need(self, wanted: Mapping[str, int], *, partly: Collection[str] = ()) -> None:
        """Have these weight files whole, and remove others that this run fetched for itself."""
        sizes = self._repository.sizes
        whole = [shard for shard, count in wanted.items() if shard not in partly or count >= _MOSTLY * sizes[shard]]
        if self._folder is not None:
            self._folder.keep_only(set(whole))
        self._fetch([shard for shard in whole if self.local(shard) is None])

    def disk_bytes(self, steps: Iterable[Iterable[str]]) -> int:
        """Most bytes of weight files that one step has in the run's own folder."""
        if not self.streams:
            return 0
        sizes = self._repository.sizes
        return max(
            (sum(sizes[own] for own in step if self._repository.cached(own) is None) for step in steps), default=0
        )

    def close(self, *, finished: bool) -> None:
        """See the base class; the user's cache is left alone."""
        if self._folder is not None:
            self._folder.close(finished=finished)

    def _ask_for_headers(self, shard: str) -> None:
        """All of them at once: a model has many shards, and each is an exchange of its own."""
        if shard not in self._repository.sizes:
            raise CheckpointError(self._missing(shard))
        others = [own for own in self._repository.weights if own not in self._headers and self.local(own) is None]
        self._pool = ThreadPoolExecutor(_HEADERS_AT_ONCE)
        self._asked = {own: self._pool.submit(self._fetch_header, own) for own in dict.fromkeys([shard, *others])}
        self._pool.shutdown(wait=False)

    def _fetched_header(self, shard: str) -> dict[str, StoredTensor]:
        try:
            return self._asked.pop(shard).result()
        except BaseException:
            # Else the process would ask for all the others before it ends.
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise

    def _missing(self, shard: str) -> str:
        from huggingface_hub import constants

        if self._repository.listed:
            return f"{self}: {shard}, which the index names, is not at commit {self._repository.commit} on {endpoint()}"
        if constants.HF_HUB_OFFLINE:
            return offline(self.spelled, shard)
        return f"{self}: {endpoint()} can't be reached, and {shard} is not in the hub's cache; try again with a network"

    def _fetch_header(self, shard: str) -> dict[str, StoredTensor]:
        octets = self._repository.read(shard, 0, _HEADER_BYTES)
        data = 8 + int.from_bytes(octets[:8], "little")
        if data > min(self._repository.sizes[shard], 8 + _MOST_HEADER_BYTES):
            raise CheckpointError(f"{self}: {shard} is no safetensors file, or a part of one; tell the model's makers")
        if data > len(octets):
            octets += self._repository.read(shard, len(octets), data - len(octets))
        self._data[shard], self._windows[shard] = data, (0, octets)
        return self._parsed(shard, bytes(octets[8:data]))

    def _own_header(self, shard: str) -> dict[str, StoredTensor]:
        """Of a weight file that is here; its place for data is noted for when it is here no more."""
        file = self.local(shard)
        if file is None:
            raise CheckpointError(self._missing(shard))
        with file.open("rb") as stream:
            self._data[shard] = 8 + int.from_bytes(stream.read(8), "little")
            return self._parsed(shard, stream.read(self._data[shard] - 8))

    def _parsed(self, shard: str, header: bytes) -> dict[str, StoredTensor]:
        try:
            return parse_header(header)
        except ValueError as err:
            raise CheckpointError(f"{self}: {shard}: {err}; tell the model's makers") from err

    def _fetch(self, shards: list[str]) -> None:
        if not shards:
            return
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise CheckpointError(offline(self.spelled, shards[0]))
        sizes = self._repository.sizes
        place = Path(constants.HF_HUB_CACHE) if self._folder is None else self._folder.path
        needed, free = sum(sizes[shard] for shard in shards), _free_bytes(place)
        if needed > free:
            less = "" if self.streams else ", or add --stream, which keeps no more than the shards of one layer"
            raise CheckpointError(
                f"{self}: needs {needed} bytes for {len(shards)} weight files in {place}, {free} are free; make room, "
                f"then run again{less}"
            )
        for shard in shards:
            self._progress.say(f"fetching {shard} of {self}, {human_bytes(sizes[shard])}")
            if self._folder is None:
                self._in_cache[shard] = self._repository.fetch(shard, None, self._progress)
            else:
                self._folder.fetch(shard)


def is_hub_name(src: str | Path) -> bool:
    """Whether a source is to be looked for on the hub: it is spelled ``ORG/NAME``, and nothing here has that name."""
    return (
        isinstance(src, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", src, re.ASCII) is not None
    ) and not os.path.lexists(src)


@contextmanager
def source_files(
    src: str, revision: str | None, folder: Path | None, progress: ProgressListener | None = None
) -> Iterator[str | CheckpointFiles]:
    """A source as the user spelled it: a directory, which wins, or a model of the hub.

    What was fetched into ``folder`` is removed once the block is done; if it fails, it is kept for another try.

    Args:
        src: directory, or ``ORG/NAME``.
        revision: branch, tag or commit of a model of the hub.
        folder: stream: weight files go there, and are removed after their last use.
        progress: told of fetching.
    Raises:
        CheckpointError: there is no such model, or it can't be had.
        ConfigError: ``revision`` or ``folder`` is given for a directory.
    """
    if not is_hub_name(src):
        for option, given in (("--revision", revision), ("--stream", folder)):
            if given is not None:
                raise ConfigError(f"{option} has no effect: {src} is not a model of the hub, ORG/NAME, but a path")
        yield src
        return
    with quiet_library():
        files = HubFiles(open_repository(src, revision), progress, folder)
        try:
            yield files
        except BaseException:
            files.close(finished=False)
            raise
        files.close(finished=True)


def _may_be_read(name: str) -> bool:
    return is_weights(name) or not name.endswith(".safetensors")


def _free_bytes(path: Path) -> int:
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free
