"""Where an output is put together until it is whole: a directory beside it, with the state that a resume needs."""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.output.files import write_text, writing
from compress_tools.output.run_identity import differences
from compress_tools.output.run_record import changed_weights, is_whole, leaves, own_files, read_record, some
from compress_tools.source.reader import CONFIG_NAME

# In the staging directory; gone once the output is published.
STATE_DIR = ".resmoe-state"
# In the state directory: what determines the output ...
IDENTITY_NAME = "identity.json"
# ... names of the files that were begun, one JSON string a line, each noted before it is made ...
BEGUN_NAME = "begun.jsonl"
# ... which destination may be replaced, so that a resumed run need not be told again ...
MAY_REPLACE_NAME = "overwrite.json"
# ... and that destination itself, between the two renames at the end.
REPLACED_NAME = "replaced"


class Staging:
    """One output: its destination, and the directory beside it where it is put together, held against others.

    A destination is replaced only if it is empty or holds nothing but what this tool wrote; a staging directory is
    gone on with or removed only if it is ours.

    Args:
        dst: the directory to be. Links are followed: a link stays, and the output lies where it leads.
    Attributes:
        dst: the directory to be, absolute and without links.
        path: the staging directory.
        state: within it, what a resume needs.
        replaced_working_directory: this process stood in ``dst`` when it was replaced, and was moved to the new one.
    Raises:
        ConfigError: ``dst`` is empty.
        CheckpointError: it has no name, or is a link that leads in circles.
    """

    def __init__(self, dst: str | Path) -> None:
        if not str(dst):
            raise ConfigError("the destination is an empty string; name a directory (`.` is the present one)")
        self.dst = Path(os.path.realpath(dst))
        if not self.dst.name:
            raise CheckpointError(f"{dst}: is the root of a file system; choose a directory inside it")
        if self.dst.is_symlink():
            raise CheckpointError(f"{dst}: is a link that leads in circles; remove it, or choose another destination")
        self.path = self.beside(".partial")
        self.state = self.path / STATE_DIR
        self.replaced_working_directory = False
        self._held: int | None = None
        self._begun: set[str] | None = None

    def beside(self, suffix: str) -> Path:
        """A path beside the destination, named after it."""
        return self.dst.with_name(self.dst.name + suffix)

    @property
    def log_path(self) -> Path:
        """The log file of every run that wrote, or tries to write, the destination: beside it, so never part of it."""
        return self.beside(".log")

    @property
    def is_begun(self) -> bool:
        """Whether an earlier run left a staging directory."""
        return os.path.lexists(self.path)

    @property
    def is_finished(self) -> bool:
        """Whether the destination is whole and nothing newer is begun."""
        return not self.is_begun and is_whole(self.dst) and own_files(self.dst) is not None

    def check_apart(self, src: str | Path) -> None:
        """Raises ConfigError where source and destination are one directory, or one lies inside the other."""
        source = Path(os.path.realpath(src))
        if source == self.dst:
            raise ConfigError(f"{self.dst}: source and destination are the same directory")
        if source in self.dst.parents or self.dst in source.parents:
            raise ConfigError(
                f"{self.dst}: source and destination lie one inside the other; choose a place outside {src}"
            )

    def check_free(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse what would be refused whatever is to be written, before any work.

        Args:
            resume: go on with what an earlier run left, or find that it is finished.
            overwrite: replace the destination and what an earlier run left.
        Raises:
            CheckpointError: the destination can't be renamed to, or is not empty; or an unfinished run is in the way.
        """
        with writing(self.dst):
            if self.dst.exists() and not self.dst.is_dir():
                raise CheckpointError(f"{self.dst}: exists and is not a directory")
            nearest = next(parent for parent in self.dst.parents if parent.exists())
            if not nearest.is_dir():
                raise CheckpointError(f"{self.dst}: {nearest} is a file; choose a place in a directory")
            if self.dst.is_mount():
                raise CheckpointError(
                    f"{self.dst}: is a mount point, which a finished checkpoint can't be renamed to; choose a "
                    "directory inside it"
                )
            if is_occupied(self.dst):
                self._check_occupied(resume=resume, overwrite=overwrite)
            if self.is_begun:
                self._check_begun(resume=resume, overwrite=overwrite)

    def open(self, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> tuple[dict[str, Any], bool]:
        """Begin, or go on; until ``close``, no other process may.

        Args:
            identity: what determines the output.
            resume: see ``check_free``.
            overwrite: see ``check_free``.
        Returns:
            the identity that the run was begun with, and whether it is finished already.
        Raises:
            CheckpointError: see ``check_free``; or what is there is another run's, or another process is writing it.
        """
        self.check_free(resume=resume, overwrite=overwrite)
        # As it comes back from a file, so that a resumed run writes the same.
        identity = json.loads(json.dumps(identity, sort_keys=True))
        with writing(self.path):
            self.tidy_published()
            if resume and self.is_finished:
                self.check_finished(identity)
                return identity, True
            if self.is_begun:
                self._held = hold(self.path)
                if resume:
                    identity = self._check_identity(identity) or identity
                else:
                    self._discard()
            self._begin(identity, overwrite=overwrite)
        return identity, False

    def close(self) -> None:
        """Let other processes write the directory."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def note(self, name: str) -> None:
        """Tell that a file of the output is about to be made, so that it is known as ours from its first byte."""
        if self._begun is None:
            self._begun = self.noted()
        if name not in self._begun:
            with (self.state / BEGUN_NAME).open("a", encoding="utf-8") as stream:
                # Begun on a line of its own even if a crash cut the one before off.
                stream.write("\n" + json.dumps(name))
            self._begun.add(name)

    def noted(self) -> set[str]:
        """Names of the files that were begun, in this run or before."""
        return _noted(self.state / BEGUN_NAME)

    def publish(self) -> None:
        """Rename the staging directory to the destination; a killed call is finished by a resume.

        Raises:
            CheckpointError: the destination appeared, or something in it, since this run was begun.
            OSError: the file system refuses.
        """
        stood_in = _is_working_directory(self.dst)
        if is_occupied(self.dst):
            self._check_still_replaceable()
            os.replace(self.dst, self.state / REPLACED_NAME)
        os.replace(self.path, self.dst)
        if stood_in:
            # The directory is another one now; the old one has no name any more.
            os.chdir(self.dst)
            self.replaced_working_directory = True
        _tidy(self.dst)

    def _check_occupied(self, *, resume: bool, overwrite: bool) -> None:
        """Raises CheckpointError where the destination, which is not empty, is in the way."""
        if resume and self.is_begun:
            self._check_still_replaceable()
            return
        own = own_files(self.dst)
        if own is None or not (overwrite or resume):
            raise self._not_empty(own)
        if overwrite:
            _check_foreign(self.dst, own)
        elif not is_whole(self.dst):
            raise self._not_empty(None)

    def _not_empty(self, own: dict[str, str | None] | None) -> CheckpointError:
        if own is not None:
            return CheckpointError(
                f"{self.dst}: not empty, it holds an output of resmoe; choose another directory, or pass --overwrite "
                "to replace it"
            )
        if (self.dst / STATE_DIR).is_dir():
            return CheckpointError(
                f"{self.dst}: not empty, it holds an unfinished output; rename it to {self.path.name} and pass "
                "--resume, or remove it"
            )
        names = some(sorted(path.name for path in self.dst.iterdir()))
        return CheckpointError(
            f"{self.dst}: not empty, and not an output of resmoe, which alone --overwrite replaces: it holds {names}; "
            "choose another directory, or move that away"
        )

    def _check_still_replaceable(self) -> None:
        """Raises CheckpointError unless the destination is the one that ``--overwrite`` was given for."""
        try:
            permitted = json.loads((self.state / MAY_REPLACE_NAME).read_text(encoding="utf-8"))["stamp"]
        except (OSError, ValueError, KeyError, TypeError):
            permitted = None
        own = own_files(self.dst)
        if permitted is None or permitted != self._stamp() or own is None:
            raise CheckpointError(
                f"{self.dst}: not empty, it appeared or was changed while {self.path} was written; both are kept: "
                "move one of them away, then run again with --resume"
            )
        _check_foreign(self.dst, own)

    def _stamp(self) -> int | None:
        """Tells one destination from another at the same place; None if it is empty."""
        if not is_occupied(self.dst):
            return None
        last = self.dst / CONFIG_NAME
        return (last if last.is_file() else self.dst).stat().st_mtime_ns

    def _check_begun(self, *, resume: bool, overwrite: bool) -> None:
        """Raises CheckpointError where the staging directory is not ours, or nobody said what to do with it."""
        if self.path.is_symlink() or not self.path.is_dir():
            raise CheckpointError(f"{self.path}: is not a directory; move it away, as the output is put together there")
        if is_occupied(self.path) and not self.state.is_dir():
            names = some(sorted(path.name for path in self.path.iterdir()))
            raise CheckpointError(
                f"{self.path}: the output is put together there, but it holds what resmoe did not write ({names}); "
                "move it away, or choose another destination"
            )
        replaced = self.state / REPLACED_NAME
        if not (resume or overwrite):
            os.close(hold(self.path))
            kept = f" (the checkpoint that it replaces is safe in {replaced})" if replaced.exists() else ""
            raise CheckpointError(
                f"{self.path}: an earlier run did not finish{kept}; pass --resume to go on, or --overwrite to start "
                "again"
            )
        if overwrite:
            own = self._own_unfinished()
            if foreign := [name for name in leaves(self.path, skip=STATE_DIR) if name not in own]:
                raise CheckpointError(
                    f"{self.path}: not removed, as it also holds what resmoe did not write: {some(foreign)}; move that "
                    "away"
                )
            if replaced.exists() and is_occupied(self.dst):
                raise CheckpointError(
                    f"{replaced}: the checkpoint that an unfinished run was to replace, and {self.dst} is there again; "
                    "move one of them away"
                )

    def _own_unfinished(self) -> set[str]:
        """What the staging directory may hold of ours, half-written files included."""
        return {name for noted in self.noted() for name in (noted, *_half_written(noted))}

    def check_finished(self, identity: dict[str, Any]) -> None:
        """Raises CheckpointError, with what differs, unless the finished destination is this very run's."""
        record = read_record(self.dst)
        if record is None:
            raise CheckpointError(
                f"{self.dst}: is finished, but does not say what it was made from, as older versions wrote it; choose "
                "another directory, or pass --overwrite to replace it"
            )
        record.check_same(self.dst, identity)

    def check_begun_from(self, source: dict[str, str]) -> None:
        """Refuse to go on with a run of another source, before anything is read of this one.

        Args:
            source: what the identity to be says of it.
        Raises:
            CheckpointError: an unfinished run is there, from another source.
        """
        if self.is_begun and (found := self._found_identity()) is not None:
            self._refuse_another(found, {**found, "source": source})

    def _check_identity(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The identity that the staging directory was begun with; None where a run was killed before it noted one."""
        found = self._found_identity()
        if found is not None:
            self._refuse_another(found, identity)
        return found

    def _found_identity(self) -> dict[str, Any] | None:
        file = self.state / IDENTITY_NAME
        if not file.exists() and not self.noted():
            return None
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as err:
            raise CheckpointError(
                f"{self.path}: not resumable, its identity is unreadable; pass --overwrite to start again"
            ) from err
        return found

    def _refuse_another(self, found: dict[str, Any], identity: dict[str, Any]) -> None:
        """Raises CheckpointError, with what differs, unless both identities are one run's."""
        if different := differences(found, identity):
            details = "; ".join(f"{part}: {text}" for part, text in different.items())
            commit = found.get("source", {}).get("commit")
            pinned = f" (--revision {commit})" if commit is not None else ""
            raise CheckpointError(
                f"{self.path}: was started from another {', '.join(different)} ({details}); resume with the same "
                f"source{pinned}, recipe and versions, or pass --overwrite to start again"
            )

    def tidy_published(self) -> None:
        """Finish a run that was killed after its last rename: only its state is left to be removed."""
        if (self.dst / STATE_DIR).is_dir() and is_whole(self.dst):
            held = hold(self.dst)
            try:
                _tidy(self.dst)
            finally:
                os.close(held)

    def _discard(self) -> None:
        """Remove what an unfinished run left, after putting back a destination that it was about to replace."""
        replaced = self.state / REPLACED_NAME
        if replaced.exists():
            os.replace(replaced, self.dst)
        shutil.rmtree(self.path)
        self.close()

    def _begin(self, identity: dict[str, Any], *, overwrite: bool) -> None:
        self.state.mkdir(parents=True, exist_ok=True)
        if self._held is None:
            self._held = hold(self.path)
        own = self._own_unfinished()
        for leftover in (*self.path.glob("*.tmp"), *self.state.glob("*.tmp")):
            if leftover.parent == self.state or leftover.name in own:
                leftover.unlink()
        if overwrite:
            write_text(self.state / MAY_REPLACE_NAME, json.dumps({"stamp": self._stamp()}))
        write_text(self.state / IDENTITY_NAME, json.dumps(identity, indent=2, sort_keys=True))


def _half_written(name: str) -> tuple[str, str]:
    """Names that a file of the output may have before it is whole."""
    return f"{name}.tmp", Path(name).with_suffix(".tmp").as_posix()


def is_occupied(directory: Path) -> bool:
    """Whether there is a directory with something in it."""
    return directory.is_dir() and any(directory.iterdir())


def check_only_ours(directory: Path) -> None:
    """Refuse to remove a finished output together with what is not ours.

    Raises:
        CheckpointError: names what else it holds.
    """
    _check_foreign(directory, own_files(directory) or {})


def _check_foreign(directory: Path, own: dict[str, str | None]) -> None:
    foreign = [name for name in leaves(directory, skip=STATE_DIR) if name not in own]
    foreign += [f"{name} (changed since)" for name in changed_weights(directory, own)]
    if foreign:
        raise CheckpointError(
            f"{directory}: not replaced or removed, as it also holds what resmoe did not note as its own: "
            f"{some(foreign)}; move that away, or choose another directory"
        )


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


def _noted(file: Path) -> set[str]:
    """The names in a file of notes; a line that a crash cut off counts for nothing."""
    names = set()
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                names.add(str(json.loads(line)))
            except ValueError:
                continue
    return names


def _is_working_directory(directory: Path) -> bool:
    try:
        return directory.samefile(Path.cwd())
    except OSError:
        return False


def _tidy(dst: Path) -> None:
    """Remove the state from a published directory, its identity last."""
    state = dst / STATE_DIR
    for path in sorted(state.iterdir(), key=lambda path: path.name == IDENTITY_NAME):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    state.rmdir()
