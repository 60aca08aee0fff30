"""Where an output is put together until it is whole: a directory beside it, with the state that a resume needs."""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.output.run_identity import differences
from compress_tools.source.reader import CONFIG_NAME

STATE_DIR = ".resmoe-state"
# A slice's last file; a checkpoint's is config.json.
MANIFEST_NAME = "resmoe_slice.json"
IDENTITY_NAME = "identity.json"
# In the state directory: the destination that --overwrite replaces, between the two renames at the end ...
REPLACED_NAME = "replaced"
# ... and the note that it may be replaced, so that a resumed run need not be told again.
MAY_REPLACE_NAME = "overwrite"


def destination(dst: str | Path) -> Path:
    """The absolute path of an output directory, without ``..``: its name and its parent are used.

    Raises:
        CheckpointError: it has no name.
    """
    path = Path(os.path.abspath(dst))
    if not path.name:
        raise CheckpointError(f"{dst}: is the root of a file system; choose a directory inside it")
    return path


def staging_path(dst: Path) -> Path:
    """Where a checkpoint is put together: beside the destination, so that the last step is a rename."""
    return dst.with_name(dst.name + ".partial")


def log_path(dst: str | Path) -> Path:
    """The log file of every run that wrote, or tries to write, ``dst``: beside it, so never part of it."""
    path = destination(dst)
    return path.with_name(path.name + ".log")


def check_destination(dst: Path) -> None:
    """Raises CheckpointError where the last rename could not succeed."""
    if dst.exists() and not dst.is_dir():
        raise CheckpointError(f"{dst}: exists and is not a directory")
    if dst.is_mount():
        raise CheckpointError(
            f"{dst}: is a mount point, which a finished checkpoint can't be renamed to; choose a directory inside it"
        )


def check_apart(src: str | Path, dst: str | Path) -> None:
    """Raises ConfigError where source and destination are one directory, or one lies inside the other."""
    source, target = Path(src).absolute().resolve(), Path(dst).absolute().resolve()
    if source == target:
        raise ConfigError(f"{dst}: source and destination are the same directory")
    if source in target.parents or target in source.parents:
        raise ConfigError(f"{dst}: source and destination lie one inside the other; choose a place outside {src}")


def is_occupied(directory: Path) -> bool:
    """Whether there is a directory with something in it."""
    return directory.is_dir() and any(directory.iterdir())


def is_published(dst: Path) -> bool:
    """Whether ``dst`` is whole but for its state, which a killed run did not get to remove.

    A directory with state but without its last file is an unfinished one that somebody renamed.
    """
    return (dst / STATE_DIR).is_dir() and any((dst / name).is_file() for name in (CONFIG_NAME, MANIFEST_NAME))


def check_identity(directory: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Read the identity that ``directory`` was started with.

    Returns:
        the recorded identity, or None where a run was killed before it recorded one, so that nothing was written.
    Raises:
        CheckpointError: it is another run's, or unreadable.
    """
    file = directory / STATE_DIR / IDENTITY_NAME
    if not file.exists() and not any(path.is_file() for path in directory.rglob("*") if path.suffix != ".tmp"):
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{directory}: not resumable, its identity is unreadable; pass --overwrite") from err
    different = differences(found, json.loads(json.dumps(identity)))
    if different:
        details = "; ".join(f"{part}: {text}" for part, text in different.items())
        raise CheckpointError(
            f"{directory}: was started from another {', '.join(different)} ({details}); resume with the same "
            "source, recipe and versions, or pass --overwrite to start again"
        )
    return found


def hold(directory: Path) -> int:
    """Keep other processes from writing a directory, until the descriptor is closed or the process is killed.

    The directory itself is locked, so that the lock goes with it when it is renamed and leaves no file behind. On a
    file system without locks nothing is held.

    Returns:
        the descriptor.
    Raises:
        CheckpointError: another process holds it, or has just renamed or removed it.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise _held(directory) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.path.samestat(os.fstat(descriptor), directory.stat())
    except (BlockingIOError, FileNotFoundError):
        mine = False
    except OSError:
        mine = True
    if not mine:
        os.close(descriptor)
        raise _held(directory)
    return descriptor


def _held(directory: Path) -> CheckpointError:
    return CheckpointError(f"{directory}: another process is writing it; wait for it, or choose another destination")


def discard(staging: Path, dst: Path) -> None:
    """Remove what an unfinished run left, after putting back a destination that it was about to replace."""
    replaced = staging / STATE_DIR / REPLACED_NAME
    if replaced.exists() and not dst.exists():
        os.replace(replaced, dst)
    shutil.rmtree(staging)


def publish(staging: Path, dst: Path, *, may_replace: bool) -> None:
    """Rename ``staging`` to ``dst``; a killed call is finished by calling it again, or by ``tidy``.

    Raises:
        CheckpointError: ``dst`` has content that may not be replaced.
        OSError: the file system refuses.
    """
    if is_occupied(dst):
        if not may_replace:
            raise CheckpointError(
                f"{dst}: appeared while {staging} was written; move one of them away, then run again with --resume"
            )
        replaced = staging / STATE_DIR / REPLACED_NAME
        if replaced.exists():
            shutil.rmtree(replaced)
        os.replace(dst, replaced)
    os.replace(staging, dst)
    tidy(dst)


def tidy(dst: Path) -> None:
    """Remove the state from a published directory, its identity last: until then a resume can tell whose it is."""
    state = dst / STATE_DIR
    for path in sorted(state.iterdir(), key=lambda path: path.name == IDENTITY_NAME):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    state.rmdir()
