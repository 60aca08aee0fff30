"""The text: source files of the running Python's standard library, split by whole module."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Whole modules, present in Python 3.11 to 3.13, that no training batch ever sees.
HELD_OUT = ("argparse.py", "heapq.py", "json", "shlex.py", "statistics.py", "textwrap.py")

# First path parts that are third-party, tests, tables of data, or bound to this one machine.
SKIPPED = (
    "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "pydoc_data", "ensurepip",
    "turtledemo",
)  # fmt: skip
SKIPPED_ANYWHERE = ("test", "tests", "__pycache__")
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True)
class Module:
    """One source file: its path inside the library, in posix form, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Training and held-out source files; disjoint, each sorted by name."""

    train: tuple[Module, ...]
    heldout: tuple[Module, ...]

    def heldout_text(self) -> str:
        """The held-out files one after the other: what heldout.txt holds."""
        return "\n".join(module.text for module in self.heldout)


def _is_used(path: Path) -> bool:
    return (
        path.parts[0] not in SKIPPED
        and not path.parts[0].startswith(SKIPPED_PREFIXES)
        and not any(part in SKIPPED_ANYWHERE for part in path.parts)
    )


def read_corpus(stdlib: Path | None = None, max_train_bytes: int | None = None) -> Corpus:
    """Read the standard library's source.

    Args:
        stdlib: folder of .py files; the running Python's own by default.
        max_train_bytes: stop adding training files once they hold this many bytes.
    Raises:
        FileNotFoundError: the folder has no training or no held-out source (a zipped or stripped Python).
    """
    root = Path(stdlib or sysconfig.get_paths()["stdlib"])
    relative = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    train, heldout, train_bytes = [], [], 0
    for name in relative:
        if not _is_used(Path(name)):
            continue
        is_heldout = Path(name).parts[0] in HELD_OUT
        if not is_heldout and max_train_bytes is not None and train_bytes >= max_train_bytes:
            continue
        data = (root / name).read_bytes()
        module = Module(name, data.decode("utf-8", errors="replace"))
        if not module.text:
            continue
        if is_heldout:
            heldout.append(module)
        else:
            train.append(module)
            train_bytes += len(data)
    if not train or not heldout:
        raise FileNotFoundError(
            f"{root}: found {len(train)} training and {len(heldout)} held-out source files, expected both; "
            "use a Python whose standard library is installed as .py files"
        )
    return Corpus(tuple(train), tuple(heldout))
