"""Files of a checkpoint's directory that are not its weights: each is copied through, or there is a reason why not."""

import os
from collections.abc import Collection
from pathlib import Path

from compress_tools.errors import CheckpointError
from compress_tools.report import CARD_NAME, PLAN_NAME, RECIPE_NAME, REPORT_NAME, SOURCE_CARD_NAME, TIMINGS_NAME
from compress_tools.text_file import in_words

# What ModelOpt writes beside config.json; it describes tensors that a decoded checkpoint does not have.
QUANTIZATION_FILES = ("hf_quant_config.json",)
WRITTEN_NAMES = (REPORT_NAME, RECIPE_NAME, TIMINGS_NAME, PLAN_NAME)

_OTHER_FORMATS = (".bin", ".pt", ".pth")
_INDEX_ENDINGS = (".safetensors.index.json", ".bin.index.json")


def is_part(name: str) -> bool:
    """Whether a file belongs to a checkpoint: what is hidden, or Python's cache, is nobody's part of a model."""
    return not any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))


def files_of(directory: Path) -> list[str]:
    """Every file of a checkpoint, relative and with ``/``, ascending; a link to a directory is one of them.

    Raises:
        CheckpointError: a directory can't be read, or a link leads nowhere.
    """
    found = []

    def refuse(err: OSError) -> None:
        raise CheckpointError(f"{err.filename}: not readable: {in_words(err)}") from err

    for folder, below, files in os.walk(directory, onerror=refuse):
        inside = Path(folder).relative_to(directory)
        links = [name for name in below if (Path(folder) / name).is_symlink()]
        below[:] = [name for name in below if is_part((inside / name).as_posix())]
        found += [(inside / name).as_posix() for name in (*files, *links)]
    found = sorted(name for name in found if is_part(name))
    for name in found:
        if not (directory / name).exists():
            raise CheckpointError(f"{directory / name}: is a link that leads nowhere; download the file, or remove it")
    return found


def why_left_out(directory: Path, name: str) -> str | None:
    """Why a file that is not the checkpoint's config, index or weights is not copied through; None for one that is.

    Args:
        directory: of the checkpoint.
        name: of the file, as ``files_of`` gives it.
    Raises:
        CheckpointError: it is to be copied, and can't be read.
    """
    path = directory / name
    if path.is_dir():
        return "a link to a directory, which is not followed"
    if not path.is_file():
        return "no regular file"
    if name.endswith(".safetensors"):
        return "weights that are not the model's: its index does not name them"
    if name.endswith(_OTHER_FORMATS):
        return "weights in another format"
    if name.endswith(_INDEX_ENDINGS):
        return "index of weights that are left out"
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path}: not readable: permission denied; make it readable, or remove it")
    return None


def why_not_ours(name: str, names: Collection[str]) -> str | None:
    """Why a file of a source has no place in what is written from it; None where it has.

    Args:
        name: of the file.
        names: of all files of the source.
    """
    if name.rpartition("/")[2] in QUANTIZATION_FILES:
        return "describes the source's quantisation"
    top = name.partition("/")[0]
    if top in WRITTEN_NAMES:
        return "an earlier run's account; this run writes its own"
    if name == SOURCE_CARD_NAME and CARD_NAME in names:
        return f"its place is taken by the source's own {CARD_NAME}"
    return None
