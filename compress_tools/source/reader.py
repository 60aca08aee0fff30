"""Sharded safetensors to tensor by name, lazily; a broken shard is found on opening."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress_tools.errors import CheckpointError
from compress_tools.format.directory import INDEX_NAME as INDEX_NAME
from compress_tools.format.directory import read_weight_map
from compress_tools.format.shard_file import StoredTensor, first_cut_tensor
from compress_tools.source.files import CheckpointFiles
from compress_tools.source.stored_bytes import as_tensor
from compress_tools.text_file import in_words, is_lfs_pointer, lfs_advice, read_json_object

SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
# Parts of config.json that are objects wherever they are given.
_OBJECTS = ("quantization_config", "text_config")
# Shards as transformers names them; without an index the names say how many there are.
_NUMBERED = re.compile(r"model-(\d{1,9})-of-(\d{1,9})\.safetensors")


class CheckpointReader:
    """A Hugging Face checkpoint directory: its config, its other files, and its tensors by name.

    The shards' headers say what tensors there are, as they do for transformers and vLLM: both load every tensor of
    every shard that the index names, and where shards share a name, the one in the last shard. What the index says
    otherwise is a remark; where it can't be told which of two tensors is meant, a refusal.

    Args:
        path: the directory, or what fetches the checkpoint's files into one.
    Attributes:
        store: where the files come from.
        path: the directory.
        config: content of config.json.
        shards: the weight files that are read, ascending.
        remarks: what is odd about the weight files, in sentences; empty for a checkpoint in order.
    Raises:
        CheckpointError: no directory, no config.json, no safetensors, a file that is not what its name says (a Git
            LFS pointer, no JSON), a shard missing or damaged, an index that names tensors which no shard has, two
            shards with different tensors of one name, weight files of which loaders take different ones.
    """

    def __init__(self, path: str | Path | CheckpointFiles) -> None:
        self.store = path if isinstance(path, CheckpointFiles) else CheckpointFiles(path)
        self.path = self.store.path
        self.config = self._read_config()
        self.remarks = list(self.store.remarks)
        self.shards = self._shard_names()
        # Weight files that are here whole, as safetensors says; one that is fetched later is not yet among them.
        self._checked: set[str] = set()
        self._shard_of: dict[str, str] = {}
        self._stored: dict[str, StoredTensor] = {}
        # Other shards that hold a tensor of the same name.
        self._copies: dict[str, list[tuple[str, StoredTensor]]] = {}
        for shard in self.shards:
            self._open(shard)
        self._check_index()
        self._check_copies()

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._shard_of)

    @property
    def headers(self) -> Mapping[str, StoredTensor]:
        """What the weight files' headers say of each tensor."""
        return self._stored

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def get(self, name: str) -> Tensor:
        """Read one tensor, in its stored dtype, on the CPU.

        Raises:
            CheckpointError: not there, or not readable.
        """
        return self._read(self.shard_of(name), name, self._stored[name])

    def get_row(self, name: str, index: int) -> Tensor:
        """Read ``tensor[index]`` without the rest.

        Raises:
            CheckpointError: not there, or not readable.
        """
        return self._read(self.shard_of(name), name, self._stored[name], index)

    def need(self, names: Iterable[str], *, partly: Collection[str] = ()) -> None:
        """The next reads are of these tensors, and of no others.

        Args:
            names: of tensors.
            partly: weight files that need not be here as a whole for a part of them.
        Raises:
            CheckpointError: their weight files can't be had.
        """
        wanted: Counter[str] = Counter()
        for name in names:
            wanted[self._shard_of[name]] += self._stored[name].nbytes
        if self.store.streams:
            self._checked.clear()
        self.store.need(wanted, partly=partly)

    def shards_of(self, names: Iterable[str]) -> list[str]:
        """The weight files that hold these tensors, ascending."""
        return sorted({self._shard_of[name] for name in names})

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._header(name).shape

    def dtype(self, name: str) -> str:
        """Stored dtype as safetensors spells it: ``BF16``, ``F16``, ``F32``, ..."""
        return self._header(name).dtype

    def nbytes(self, name: str) -> int:
        """Stored bytes of a tensor, without reading it."""
        return self._header(name).nbytes

    def shard_of(self, name: str) -> str:
        """The weight file that a tensor is read from: the index decides where several hold the name."""
        self._header(name)
        return self._shard_of[name]

    def other_files(self) -> list[Path]:
        """Files that are neither weights nor config.json: tokenizer, generation config, code, licence."""
        return [self.path / name for name, why in self.files().items() if why is None]

    def files(self) -> dict[str, str | None]:
        """Files besides config, index and weights, relative and with ``/``: why they are not copied through, or None.

        Raises:
            CheckpointError: a directory can't be read, or a link leads nowhere.
        """
        own = {CONFIG_NAME, INDEX_NAME, *self.shards}
        return {name: self.store.why_left_out(name) for name in self.store.names() if name not in own}

    def fingerprint(self) -> dict[str, str]:
        """Identity of the source's weights and config: a digest for config.json and for each shard.

        A shard's covers its size, its header, and of each tensor the first and last 4 KiB and 4 KiB in every 16 MiB.
        Not its modification time: a copy on another machine, or a repaired file, is the same source.

        Raises:
            CheckpointError: a shard is not readable.
        """
        content = json.dumps(self.config, sort_keys=True).encode()
        return {CONFIG_NAME: hashlib.sha256(content).hexdigest()} | self.store.identity(self.shards)

    def _header(self, name: str) -> StoredTensor:
        if name not in self._stored:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        return self._stored[name]

    def _read(self, shard: str, name: str, stored: StoredTensor, index: int | None = None) -> Tensor:
        """A tensor of a shard, or one of its rows."""
        file = self.store.local(shard)
        if file is not None:
            if shard not in self._checked:
                self._check_shard(shard)
            _check_there(file)
        with self._reading(name, "" if index is None else f"[{index}]"):
            if index is None:
                return as_tensor(self.store.read(shard, stored), stored.dtype, stored.shape)
            row = range(stored.shape[0])[index]
            size = stored.nbytes // stored.shape[0]
            octets = self.store.read(shard, stored, row * size, (row + 1) * size)
            return as_tensor(octets, stored.dtype, stored.shape[1:])

    @contextmanager
    def _reading(self, name: str, part: str = "") -> Iterator[None]:
        """What can stop a read, dtypes that torch lacks included, as one error."""
        try:
            yield
        except (SafetensorError, OSError, RuntimeError, ValueError, IndexError, AttributeError) as err:
            dtype, shape = self.dtype(name), list(self.shape(name))
            raise CheckpointError(
                f"{self.path / self._shard_of[name]}: can't read {name!r}{part}, {dtype} {shape}: {in_words(err)}"
            ) from err

    def _read_config(self) -> dict[str, Any]:
        file = self.path / CONFIG_NAME
        if not file.exists():
            raise CheckpointError(f"{file}: missing; expected a Hugging Face checkpoint directory")
        config = read_json_object(file)
        for key in _OBJECTS:
            if not isinstance(config.get(key), dict | None):
                raise CheckpointError(f"{file}: {key}: expected a JSON object, found {config[key]!r:.60}")
        return config

    def _shard_names(self) -> list[str]:
        index = self.path / INDEX_NAME
        self._weight_map: dict[str, str] | None = None
        beside = self.store.beside_config()
        single, numbered = SINGLE_NAME in beside, [name for name in beside if _NUMBERED.fullmatch(name)]
        if index.exists():
            self._weight_map = read_weight_map(index)
            shards = sorted(set(self._weight_map.values()))
            if single and shards != [SINGLE_NAME]:
                raise self._two_models(f"the files that {INDEX_NAME} names")
            self._check_series(shards, numbered)
            return shards
        if single and numbered:
            raise self._two_models(f"{numbered[0]} too")
        if single:
            return [SINGLE_NAME]
        if numbered:
            self._check_numbers(numbered)
            self.remarks.append(f"there is no {INDEX_NAME}; the {len(numbered)} shards' headers say what is in them")
            return numbered
        others = [name for name in beside if name.endswith(".safetensors")]
        found = f" (found: {', '.join(others[:3])}{', ...' if len(others) > 3 else ''})" if others else ""
        raise CheckpointError(
            f"{self.path}: no {INDEX_NAME} and no {SINGLE_NAME} or model-00001-of-N.safetensors{found}; only "
            "safetensors of these names are read"
        )

    def _two_models(self, other: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: transformers would load {SINGLE_NAME}, vLLM {other}; move away what is not the model"
        )

    def _check_series(self, shards: list[str], numbered: list[str]) -> None:
        """A shard that the index leaves out whole would be lost."""
        totals = {match[2] for name in shards if (match := _NUMBERED.fullmatch(name)) is not None}
        for name in numbered:
            match = _NUMBERED.fullmatch(name)
            if match is not None and match[2] in totals and name not in shards:
                raise CheckpointError(
                    f"{self.path}: {INDEX_NAME} does not name {name}, but others of {match[2]} shards; move the index "
                    "away, as the shards say what is in them, or the shard, if it is no part of the model"
                )

    def _check_numbers(self, shards: list[str]) -> None:
        """Without an index, names must be those of one whole series."""
        matches = [match for name in shards if (match := _NUMBERED.fullmatch(name)) is not None]
        numbers, counts = {int(match[1]) for match in matches}, {int(match[2]) for match in matches}
        if len(counts) > 1 or len(numbers) < len(shards):
            raise CheckpointError(
                f"{self.path}: shards of more than one series ({shards[0]}, {shards[-1]}) and no {INDEX_NAME} that "
                "says which are the model; move the others away"
            )
        (count,) = counts
        missing = next((number for number in range(1, len(shards) + 1) if number not in numbers), len(shards) + 1)
        if len(shards) < count or missing <= len(shards):
            raise CheckpointError(
                f"{self.path}: {len(shards)} of {count} shards are there, and no {INDEX_NAME}: shard {missing} of "
                f"{count} is missing; download it"
            )

    def _open(self, shard: str) -> None:
        if self.store.local(shard) is not None:
            self._check_shard(shard)
        for name, stored in self.store.header(shard).items():
            if name in self._shard_of:
                self._copies.setdefault(name, []).append((self._shard_of[name], self._stored[name]))
            # The last counts.
            self._shard_of[name], self._stored[name] = shard, stored

    def _check_shard(self, shard: str) -> None:
        """Offsets, shapes and the file's length agree; its header is mapped for that moment, and never its data."""
        file = self.store.local(shard) or self.path / shard
        _check_there(file)
        if not file.is_file():
            found = "a directory" if file.is_dir() else "a pipe or a device"
            raise CheckpointError(f"{file}: is {found}; expected a weight file")
        try:
            with safe_open(file, framework="pt", device="cpu"):
                self._checked.add(shard)
        except (OSError, MemoryError) as err:  # more than a process may map, where that is limited
            raise CheckpointError(f"{file}: not readable: {in_words(err)}") from err
        except SafetensorError as err:
            if is_lfs_pointer(file):
                raise CheckpointError(f"{file}: {lfs_advice(file)}") from err
            raise CheckpointError(
                f"{file}: truncated or corrupt shard: {err}{first_cut_tensor(file)}; download it again"
            ) from err

    def _check_index(self) -> None:
        if self._weight_map is None:
            return
        missing = sorted(set(self._weight_map) - set(self._shard_of))
        if missing:
            raise CheckpointError(
                f"{self.path}: {len(missing)} tensors of {INDEX_NAME} are not in their shards, first {missing[0]!r}"
            )
        unnamed = sorted(set(self._shard_of) - set(self._weight_map))
        if unnamed:
            self.remarks.append(
                f"{len(unnamed)} tensors of the shards are not in {INDEX_NAME}, first {unnamed[0]!r}; they count, as "
                "every loader loads them"
            )
        moved = [name for name in sorted(self._weight_map) if not self._holds(self._weight_map[name], name)]
        if moved:
            self.remarks.append(
                f"{len(moved)} tensors are in another shard than {INDEX_NAME} says, first {moved[0]!r} in "
                f"{self._shard_of[moved[0]]}"
            )

    def _holds(self, shard: str, name: str) -> bool:
        return self._shard_of[name] == shard or any(other == shard for other, _ in self._copies.get(name, ()))

    def _check_copies(self) -> None:
        """A tensor in several shards is one tensor, or the index means the one that loaders take."""
        for name, copies in sorted(self._copies.items()):
            last = self._shard_of[name]
            different = [shard for shard, stored in copies if not self._is_copy(name, shard, stored)]
            if different and (self._weight_map or {}).get(name) != last:
                raise CheckpointError(
                    f"{self.path}: {different[0]} and {last} hold different tensors named {name!r}; loaders take that "
                    f"of {last}, which {INDEX_NAME} doesn't say; download the model again, or move one shard away"
                )
        if self._copies:
            first = min(self._copies)
            self.remarks.append(
                f"{len(self._copies)} tensors are in more than one shard, first {first!r}; the one in "
                f"{self._shard_of[first]} counts"
            )

    def _is_copy(self, name: str, shard: str, stored: StoredTensor) -> bool:
        """Whether another shard's tensor is the very one that counts."""
        own = self._stored[name]
        if (own.dtype, own.shape) != (stored.dtype, stored.shape):
            return False
        with self._reading(name):
            tensors = [self._read(shard, name, stored), self._read(self._shard_of[name], name, own)]
            first, second = (tensor.reshape(-1).view(torch.uint8) for tensor in tensors)
            return torch.equal(first, second)


def _check_there(file: Path) -> None:
    if not file.exists():
        raise CheckpointError(f"{file}: shard named by {INDEX_NAME} is missing")
