"""The Markdown pages of the repository, their fenced blocks and the commands in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "compress_tools/**/*.md", ".github/**/*.md")
    for page in REPO.glob(pattern)
)
LANGUAGES = ("bash", "console", "json", "python", "text", "yaml")
# Why a block (by its first line) or a line (by its end) is not run. Visible on the page, whatever renders it.
MARK = re.compile(r"# (needs (a GPU|the hub|the network|Docker|a Ray cluster)|takes .+|tested by (?P<test>\S+))$")
_FENCE = re.compile(r"^( *)```(.*)$")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: its file.
        line: number of its opening line.
        language: the fence's info string.
        lines: its content.
    """

    page: Path
    line: int
    language: str
    lines: tuple[str, ...]

    @property
    def where(self) -> str:
        """For people and test ids."""
        return f"{name(self.page)}:{self.line}"

    @property
    def mark(self) -> re.Match[str] | None:
        """Why the whole block is not run."""
        return MARK.match(self.lines[0]) if self.lines else None


@dataclass(frozen=True)
class Command:
    """One command of a block.

    Attributes:
        where: page and line.
        words: as a shell would split it.
        env: variables set for it alone.
        mark: why it is not run, if so.
    """

    where: str
    words: tuple[str, ...]
    env: dict[str, str]
    mark: str | None

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"


def name(page: Path) -> str:
    """A page's path as links and people write it."""
    return page.relative_to(REPO).as_posix()


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    opened: tuple[int, str, list[str]] | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if fence and opened is None:
            opened = (number, fence[2].strip(), [])
        elif fence and opened is not None:
            found.append(Block(page, opened[0], opened[1], tuple(opened[2])))
            opened = None
        elif opened is not None:
            opened[2].append(line)
    if opened is not None:
        raise ValueError(f"{name(page)}:{opened[0]}: a fence is opened and never closed")
    return found


def commands_of(block: Block) -> list[Command]:
    """The commands of a block: of ``bash`` every line, of ``console`` those after a ``$``."""
    found = []
    for offset, line in enumerate(block.lines, 1):
        text = line
        if block.language == "console":
            if not line.startswith("$ "):
                continue
            text = line[2:]
        where = f"{name(block.page)}:{block.line + offset}"
        mark = block.mark or MARK.search(text)
        reason = mark[0] if mark else "# shown output" if block.language == "console" else None
        words = shlex.split(text, comments=True)
        for part in _split(words, "&&"):
            env = {}
            while part and (setting := re.fullmatch(r"([A-Z_]+)=(.*)", part[0])):
                env[setting[1]] = setting[2]
                part = part[1:]
            if part:
                found.append(Command(where, tuple(part), env, reason))
    return found


def prose_of(page: Path) -> str:
    """A page without its fenced blocks, every other line where it was."""
    text, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = _FENCE.match(line) is not None
        inside ^= fence
        text.append("" if inside or fence else line)
    return "\n".join(text)


def inline_code(page: Path) -> list[str]:
    """The inline code of a page, a table's escaped bars unescaped."""
    return [span.replace("\\|", "|") for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose_of(page))]


def _split(words: list[str], separator: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == separator:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts
