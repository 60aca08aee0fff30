"""Sharded safetensors to tensor by name, lazily; a broken shard is found on opening."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress_tools.errors import CheckpointError
from compress_tools.format.dtypes import SAFETENSORS_BYTES
from compress_tools.format.shard_file import first_cut_tensor, shard_digest

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


class CheckpointReader:
    """A Hugging Face checkpoint directory: its config, its other files, and its tensors by name.

    Args:
        path: the directory.
    Raises:
        CheckpointError: no directory, no config.json, no safetensors, a shard missing or damaged, an index
            that names tensors which the shards lack.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            # as the hub spells a model
            named = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is not None
            advice = f"; a model of the hub must be downloaded: `hf download {path} --local-dir DIR`" if named else ""
            raise CheckpointError(
                f"{self.path}: no such directory; expected a Hugging Face checkpoint directory{advice}"
            )
        self.config: dict[str, Any] = self._read_json(CONFIG_NAME)
        self.shards = self._shard_names()
        self._handles: dict[str, Any] = {}
        self._shard_of: dict[str, str] = {}
        for shard in self.shards:
            self._open(shard)
        self._check_index()

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._shard_of)

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def get(self, name: str) -> Tensor:
        """Read one tensor, in its stored dtype, on the CPU.

        Raises:
            CheckpointError: not there, or not readable.
        """
        handle = self._handle(name)
        try:
            return handle.get_tensor(name)
        except (SafetensorError, OSError) as err:
            raise CheckpointError(f"{self.path / self._shard_of[name]}: can't read {name!r}: {err}") from err

    def get_row(self, name: str, index: int) -> Tensor:
        """Read ``tensor[index]`` without the rest.

        Raises:
            CheckpointError: not there, or not readable.
        """
        try:
            return self._handle(name).get_slice(name)[index]
        except (SafetensorError, OSError) as err:
            raise CheckpointError(f"{self.path / self._shard_of[name]}: can't read {name!r}[{index}]: {err}") from err

    def release(self) -> None:
        """Unmap the shards, so that pages already read count for this process no more; the next read maps again."""
        self._handles.clear()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Stored dtype as safetensors spells it: ``BF16``, ``F16``, ``F32``, ..."""
        return self._handle(name).get_slice(name).get_dtype()

    def nbytes(self, name: str) -> int:
        """Stored bytes of a tensor, without reading it."""
        count = 1
        for size in self.shape(name):
            count *= size
        return count * SAFETENSORS_BYTES[self.dtype(name)]

    def other_files(self) -> list[Path]:
        """Files that are neither shards, index nor config.json: tokenizer, generation config, code, licence."""
        skip = {CONFIG_NAME, INDEX_NAME, *self.shards}
        return sorted(
            file
            for file in self.path.rglob("*")
            if file.is_file()
            and file.name not in skip
            and file.suffix not in (".safetensors", ".bin", ".pt", ".pth")
            and not any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(self.path).parts)
        )

    def fingerprint(self) -> dict[str, str]:
        """Identity of the source's weights and config: a digest for config.json and for each shard.

        A shard's covers its size, its header, and of each tensor the first and last 4 KiB and 4 KiB in every 16 MiB.
        Not its modification time: a copy on another machine, or a repaired file, is the same source.

        Raises:
            CheckpointError: a shard is not readable.
        """
        content = json.dumps(self.config, sort_keys=True).encode()
        return {CONFIG_NAME: hashlib.sha256(content).hexdigest()} | {
            shard: shard_digest(self.path / shard) for shard in self.shards
        }

    def _handle(self, name: str) -> Any:
        if name not in self._shard_of:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        shard = self._shard_of[name]
        if shard not in self._handles:
            self._handles[shard] = self._map(shard)
        return self._handles[shard]

    def _read_json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as err:
            raise CheckpointError(f"{file}: missing; expected a Hugging Face checkpoint directory") from err
        except (OSError, ValueError) as err:
            raise CheckpointError(f"{file}: not readable as JSON: {err}") from err
        if not isinstance(content, dict):
            raise CheckpointError(f"{file}: expected a JSON object")
        return content

    def _shard_names(self) -> list[str]:
        if (self.path / INDEX_NAME).is_file():
            self._weight_map = self._read_json(INDEX_NAME).get("weight_map")
            if not isinstance(self._weight_map, dict) or not self._weight_map:
                raise CheckpointError(f"{self.path / INDEX_NAME}: no weight_map")
            return sorted(set(self._weight_map.values()))
        self._weight_map = None
        if (self.path / SINGLE_NAME).is_file():
            return [SINGLE_NAME]
        raise CheckpointError(f"{self.path}: no {INDEX_NAME} and no {SINGLE_NAME}; only safetensors are read")

    def _open(self, shard: str) -> None:
        handle = self._handles[shard] = self._map(shard)
        for name in handle.keys():
            if self._weight_map is None or self._weight_map.get(name) == shard:
                self._shard_of[name] = shard

    def _map(self, shard: str) -> Any:
        file = self.path / shard
        if not file.is_file():
            raise CheckpointError(f"{file}: shard named by {INDEX_NAME} is missing")
        try:
            return safe_open(file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as err:
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
