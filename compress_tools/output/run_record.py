"""What a finished output says of its own making: the run that it came from, and the files that are its own.

A checkpoint, compressed or restored, carries it in ``model.safetensors.index.json`` beside ``weight_map``, where every
reader of that file passes over it; a slice in its manifest. By it ``--resume`` tells that everything is done, and
``--overwrite`` what it may remove.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress_tools.errors import CheckpointError
from compress_tools.format.shard_file import file_checksum, first_cut_tensor, shard_digest
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
# Of the record: SHA-256 of config.json.
CONFIG_KEY = "config"
# Of the record: SHA-256 of the other texts that are ours and the same in every run, by name, and of the index itself.
TEXTS_KEY = "texts"
DIGESTED = (REPORT_NAME, RECIPE_NAME, PLAN_NAME)
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


def digested_texts(directory: Path, config: str) -> dict[str, Any]:
    """What an index's record says of the texts beside it, those in ``directory`` and config.json to be.

    The place of the index's own digest is empty: ``with_own_digest`` fills it.
    """
    written = {name: file_checksum(directory / name) for name in DIGESTED if (directory / name).is_file()}
    return {CONFIG_KEY: text_digest(config), TEXTS_KEY: {**written, INDEX_NAME: ""}}


def with_own_digest(index: dict[str, Any], text: Callable[[Any], str]) -> str:
    """The text of an index whose record holds the SHA-256 of that text with the digest's place left empty.

    Args:
        index: with the result of ``digested_texts`` in its record.
        text: makes a JSON file's text.
    """
    index[RECORD_KEY][TEXTS_KEY][INDEX_NAME] = text_digest(text(index))
    return text(index)


def changed_texts(directory: Path) -> list[str]:
    """Texts of the output in ``directory`` that are not as its index says; of versions before it says less, or nothing.

    The index comes first: where it is another, what it says of others counts for nothing. What can't be read as JSON
    is left to whoever reads it, and so is what is missing.
    """
    record = _read_json(directory / INDEX_NAME).get(RECORD_KEY)
    if not isinstance(record, dict):
        return []
    texts = record.get(TEXTS_KEY, {})
    if TEXTS_KEY in record and not (isinstance(texts, dict) and _holds_own_digest(directory, texts)):
        return [INDEX_NAME]
    written = {CONFIG_NAME: record.get(CONFIG_KEY), **texts}
    names = [name for name in (CONFIG_NAME, *DIGESTED) if written.get(name) is not None]
    return [name for name in names if _differs(directory / name, written[name])]


def _holds_own_digest(directory: Path, texts: dict[str, Any]) -> bool:
    digest = str(texts.get(INDEX_NAME))
    emptied = (directory / INDEX_NAME).read_bytes().replace(digest.encode(), b"", 1)
    return hashlib.sha256(emptied).hexdigest() == digest


def _differs(file: Path, digest: object) -> bool:
    try:
        return file.is_file() and file_checksum(file) != digest
    except OSError:
        return False


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
