"""Slices of a compression: which shards each machine makes, and the directory it leaves for ``resmoe merge``."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.output.outline import Outline
from compress_tools.output.run_record import MANIFEST_NAME
from compress_tools.output.staging import Staging
from compress_tools.output.target import CompressionTarget, Shard
from compress_tools.output.writer import CheckpointWriter
from compress_tools.text_file import in_words

T = TypeVar("T")
# Files of the source that are not weights, in the first slice.
FILES_DIR = Path("files")


@dataclass(frozen=True)
class Slice:
    """``--shard number/count``: one of ``count`` parts of the work, numbered from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, items: list[T]) -> list[T]:
        """This part of ``items``: neighbours, and as many as in any other part, or one more."""
        return items[len(items) * (self.number - 1) // self.count : len(items) * self.number // self.count]


def make_slice(text: str) -> Slice:
    """Read ``--shard``.

    Args:
        text: ``i/n`` with ``1 <= i <= n``.
    Raises:
        ConfigError: names the value found and the rule.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip(), re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--shard {text}: expected I/N with 1 <= I <= N, such as 1/4")
    return Slice(int(match[1]), int(match[2]))


def slice_path(dst: str | Path, part: Slice) -> Path:
    """Where a slice of ``dst`` goes: beside it. It has no config.json, so nothing takes it for a checkpoint."""
    return Staging(dst).beside(f".shard-{part.number}-of-{part.count}")


def shards_of(target: CompressionTarget, part: Slice) -> list[Shard]:
    """The shards that a slice makes: neighbouring layers, so that it reads few source files, and copied tensors.

    Raises:
        ConfigError: there are more slices than layers.
    """
    layers = [shard for shard in target.shards if shard.layer is not None]
    copied = [shard for shard in target.shards if shard.layer is None]
    if part.count > len(layers):
        raise ConfigError(f"--shard {part}: {len(layers)} layers are to be compressed, so at most {len(layers)} slices")
    return part.of(copied) + part.of(layers)


def files_of(files: dict[Path, Path], part: Slice) -> dict[Path, Path]:
    """The files that a slice copies through, relative output path to source path: the first slice has them all."""
    return {FILES_DIR / relative: file for relative, file in files.items()} if part.number == 1 else {}


@dataclass(frozen=True)
class SliceManifest:
    """A slice directory that has been read back.

    Attributes:
        path: the directory.
        part: which slice.
        identity: of the run.
        outline: of the whole checkpoint.
        records: of the slice's shards, by file.
    """

    path: Path
    part: Slice
    identity: dict[str, Any]
    outline: Outline
    records: dict[str, dict[str, Any]]

    def has_shard(self, filename: str, directory: Path) -> bool:
        """Whether a shard lies in ``directory`` at its recorded size."""
        file = directory / filename
        return file.is_file() and file.stat().st_size == self.records[filename]["bytes"]

    def check_shard(self, filename: str) -> None:
        """Raises CheckpointError if a shard is missing from the slice, or of another size."""
        if not self.has_shard(filename, self.path):
            raise CheckpointError(
                f"{self.path / filename}: missing, or not of {self.records[filename]['bytes']} bytes; copy or make the "
                "slice again"
            )

    def check_shards(self) -> None:
        """Raises CheckpointError if any shard is missing from the slice, or of another size."""
        for filename in self.records:
            self.check_shard(filename)

    def files(self) -> dict[Path, Path]:
        """Files to copy through: relative output path to where it lies. Empty but in the first slice."""
        root = self.path / FILES_DIR
        return {file.relative_to(root): file for file in sorted(root.rglob("*")) if file.is_file()}


def finish_slice(
    writer: CheckpointWriter,
    part: Slice,
    outline: Outline,
    files: dict[Path, Path],
    records: dict[str, dict[str, Any]],
) -> None:
    """Write the manifest and the files to copy through, and publish.

    Args:
        writer: holds every shard of the slice.
        part: which slice.
        outline: of the whole checkpoint.
        files: what ``files_of`` gives.
        records: of the slice's shards, by file.
    Raises:
        CheckpointError: the disk is full or fails; can be resumed.
    """
    for relative, file in files.items():
        writer.copy_file(file, relative)
    content = {
        "slice": [part.number, part.count],
        "identity": writer.identity,
        "outline": outline.content(),
        "records": records,
        "files": writer.run_record(MANIFEST_NAME).files,
    }
    writer.write_json(MANIFEST_NAME, content)
    writer.publish()


def read_slice(path: Path) -> SliceManifest:
    """Read a slice's manifest.

    Raises:
        CheckpointError: not a slice, unfinished, or its manifest is damaged.
    """
    try:
        content = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
        manifest = SliceManifest(
            path,
            Slice(*content["slice"]),
            content["identity"],
            Outline(**content["outline"]),
            content["records"],
        )
    except (FileNotFoundError, NotADirectoryError) as err:
        if Staging(path).is_begun:
            raise CheckpointError(
                f"{path}: not finished; go on with `resmoe compress --shard ... --resume` where it is made"
            ) from err
        raise CheckpointError(
            f"{path}: not a slice, it has no {MANIFEST_NAME}; expected what `resmoe compress --shard` wrote"
        ) from err
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise CheckpointError(
            f"{path / MANIFEST_NAME}: not readable: {in_words(err)}; copy or make the slice again"
        ) from err
    return manifest
