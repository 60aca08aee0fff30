"""What a finished output says of its own making: the run that it came from, and the files that are its own.

A checkpoint, compressed or restored, carries it in ``model.safetensors.index.json`` beside ``weight_map``, where every
reader of that file passes over it; a slice in its manifest. By it ``--resume`` tells that everything is done, and
``--overwrite`` what it may remove.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress_tools.errors import CheckpointError
from compress_tools.format.shard_file import first_cut_tensor, shard_digest
from compress_tools.output.run_identity import MACHINE, differences
from compress_tools.report import (
    CARD_NAME,
    PLAN_NAME,
    RECIPE_NAME,
    REPORT_NAME,
    SOURCE_CARD_NAME,
    TIMINGS_NAME,
)
from compress_tools.source.reader import CONFIG_NAME, INDEX_NAME

# A slice's last file; a checkpoint's is config.json.
MANIFEST_NAME = "resmoe_slice.json"
# Of the index.
RECORD_KEY = "resmoe_run"
# Of the record: SHA-256 of config.json, which no report can hold that lies beside it from before.
CONFIG_KEY = "config"
# Names that a checkpoint of a version without a record is known by, beside its shards.
_KNOWN_NAMES = {
    CONFIG_NAME,
    INDEX_NAME,
    RECIPE_NAME,
    REPORT_NAME,
    TIMINGS_NAME,
    PLAN_NAME,
    CARD_NAME,
    SOURCE_CARD_NAME,
}


@dataclass(frozen=True)
class RunRecord:
    """A finished output's own account.

    Attributes:
        identity: what determined it; without the machine, which only the last bits follow.
        files: everything that was written, relative and with ``/``, ascending; a weight file with ``shard_digest``,
            which tells new weights in an old place, else None.
    """

    identity: dict[str, Any]
    files: dict[str, str | None]

    def content(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def check_same(self, directory: Path, identity: dict[str, Any]) -> None:
        """Raises CheckpointError, with what differs, unless ``directory`` holds what a run of this identity wrote."""
        if different := differences(self.identity, json.loads(json.dumps(identity))):
            details = "; ".join(f"{part}: {text}" for part, text in different.items())
            raise CheckpointError(
                f"{directory}: is finished, and was made from another {', '.join(different)} ({details}); choose "
                "another directory, or pass --overwrite to replace it"
            )
        if changed := changed_weights(directory, self.files):
            raise CheckpointError(
                f"{directory}: is finished, but {some(changed)} changed since; choose another directory, or move that "
                "away and pass --overwrite"
            )


def make_record(identity: dict[str, Any], directory: Path, names: set[str]) -> RunRecord:
    """The record of an output that consists of files of these ``names``; weight files are in ``directory`` already."""
    return RunRecord(
        {part: value for part, value in identity.items() if part != MACHINE},
        {name: shard_digest(directory / name) if name.endswith(".safetensors") else None for name in sorted(names)},
    )


def changed_weights(directory: Path, files: dict[str, str | None]) -> list[str]:
    """Weight files that hold others than were written; one that is missing, cut off or garbled is nobody's work."""
    changed = []
    for name, digest in files.items():
        try:
            if digest is not None and shard_digest(directory / name) != digest:
                changed += [] if first_cut_tensor(directory / name) else [name]
        except CheckpointError:
            continue
    return changed


def read_record(directory: Path) -> RunRecord | None:
    """The record of the output in ``directory``; None where there is none, as after versions that wrote none."""
    content = _read_json(directory / INDEX_NAME).get(RECORD_KEY) or _read_json(directory / MANIFEST_NAME)
    if not isinstance(content, dict):
        return None
    identity, files = content.get("identity"), content.get("files")
    if not isinstance(identity, dict) or not isinstance(files, dict):
        return None
    return RunRecord(identity, files)


def text_digest(text: str) -> str:
    """SHA-256 of a text file's content, in hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def config_digest(directory: Path) -> str | None:
    """What the record of the output in ``directory`` says of config.json; None after versions that did not."""
    record = _read_json(directory / INDEX_NAME).get(RECORD_KEY)
    found = record.get(CONFIG_KEY) if isinstance(record, dict) else None
    return found if isinstance(found, str) else None


def is_whole(directory: Path) -> bool:
    """Whether ``directory`` holds an output's last file."""
    return any((directory / name).is_file() for name in (CONFIG_NAME, MANIFEST_NAME))


def own_files(directory: Path) -> dict[str, str | None] | None:
    """What this tool wrote into ``directory``, as ``RunRecord.files``; None if it holds no output of ours."""
    record = read_record(directory)
    if record is not None:
        return record.files
    block = _read_json(directory / CONFIG_NAME).get("quantization_config")
    if not isinstance(block, dict) or block.get("quant_method") != "resmoe":
        return None
    weight_map = _read_json(directory / INDEX_NAME).get("weight_map")
    return dict.fromkeys(_KNOWN_NAMES | set(map(str, weight_map.values() if isinstance(weight_map, dict) else ())))


def leaves(directory: Path, *, skip: str | None = None) -> Iterator[str]:
    """Everything below ``directory`` that is no directory with content, relative and with ``/``, by name.

    Args:
        directory: to be looked through; links in it are not followed.
        skip: an entry of it that is passed over.
    """
    for path in sorted(directory.iterdir()):
        if path.name == skip:
            continue
        if path.is_symlink() or not path.is_dir():
            yield path.name
            continue
        below = [f"{path.name}/{name}" for name in leaves(path)]
        yield from below or [path.name]


def some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
