"""Reads a Dockerfile into its instructions; what `make image-check` would not do as an engine does is refused."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

KNOWN = ("FROM", "RUN", "WORKDIR", "ENV", "COPY", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT")
_ONCE = ("FROM", "WORKDIR", "USER", "HEALTHCHECK", "ENTRYPOINT")
# Of a shell's grammar a RUN has `&&` and words alone; the rest would have to be split as a shell does.
_SHELL = re.compile(r"[\"'`|;<>()#]|\$|(?<!&)&(?!&)")


class DockerfileError(Exception):
    """An instruction that the check does not know, or a form of it."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, comments dropped and continuation lines joined.

    Attributes:
        where: file and line.
        name: in capital letters.
        rest: its arguments.
    """

    where: str
    name: str
    rest: str

    def __str__(self) -> str:
        return f"{self.name} {self.rest}"

    def refused(self, why: str) -> DockerfileError:
        """What to raise about it."""
        return DockerfileError(f"{self.where}: {self.name} {self.rest[:80]!r}: {why}")

    def commands(self) -> list[str]:
        """The commands that a RUN joins by ``&&``."""
        if self.rest.startswith(("--", "[")) or _SHELL.search(self.rest):
            raise self.refused("this check knows commands of plain words, joined by &&")
        return [" ".join(part.split()) for part in self.rest.split("&&")]

    def settings(self) -> dict[str, str]:
        """The variables of an ENV."""
        words = self.rest.split()
        if not all(re.fullmatch(r"\w+=[^\"'\\]*", word) for word in words):
            raise self.refused("this check knows NAME=VALUE without quotes")
        return dict(word.split("=", 1) for word in words)

    def copied(self) -> tuple[list[str], str]:
        """The sources of a COPY and their target."""
        *sources, target = self.rest.split()
        if not sources or self.rest.startswith(("--", "[")) or re.search(r"[*?$\[\]]", self.rest):
            raise self.refused("this check knows files and folders by name, without options")
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in (*sources, target)):
            raise self.refused("this check copies from the repository into WORKDIR alone")
        return sources, target

    def python(self) -> str:
        """The version of Python that a FROM brings."""
        found = re.fullmatch(r"python:(\d+\.\d+)\S*", self.rest)
        if found is None:
            raise self.refused("this check knows Python's own images, python:X.Y...")
        return found[1]

    def uid(self) -> int:
        """The user of a USER."""
        found = re.fullmatch(r"(\d+)(:\1)?", self.rest)
        if found is None:
            raise self.refused("this check knows UID or UID:UID")
        return int(found[1])

    def words(self) -> list[str]:
        """The command of an ENTRYPOINT or a HEALTHCHECK, which must be a list of words."""
        text = self.rest
        if self.name == "HEALTHCHECK":
            found = re.fullmatch(r"(?:--[a-z-]+=\S+\s+)*CMD\s+(.*)", text)
            if found is None:
                raise self.refused("this check knows options and CMD")
            text = found[1]
        try:
            words = json.loads(text)
        except json.JSONDecodeError as err:
            raise self.refused('this check knows ["WORD", ...]') from err
        if not words or not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise self.refused('this check knows ["WORD", ...]')
        return words


_CHECKS = {
    "FROM": Instruction.python, "RUN": Instruction.commands, "ENV": Instruction.settings, "COPY": Instruction.copied,
    "USER": Instruction.uid, "HEALTHCHECK": Instruction.words, "ENTRYPOINT": Instruction.words,
}  # fmt: skip


def read(path: Path) -> list[Instruction]:
    """The instructions of a Dockerfile, in order.

    Raises:
        DockerfileError: names the line and what was expected there.
    """
    found: list[Instruction] = []
    open_parts: list[str] = []
    begun = 0
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.strip()
        if not found and not open_parts and re.match(r"#\s*(escape|syntax|check)\s*=", text):
            raise DockerfileError(f"{path.name}:{number}: {text!r}: this check knows no parser directives")
        if not text or text.startswith("#"):
            continue
        begun = begun if open_parts else number
        open_parts.append(text.removesuffix("\\").strip())
        if text.endswith("\\"):
            continue
        name, _, rest = " ".join(open_parts).partition(" ")
        open_parts = []
        found.append(_known(Instruction(f"{path.name}:{begun}", name.upper(), rest.strip()), found))
    if open_parts:
        raise DockerfileError(f"{path.name}:{begun}: the instruction goes on behind the file's end")
    if not found or found[0].name != "FROM":
        raise DockerfileError(f"{path.name}: expected FROM first")
    return found


def _known(one: Instruction, before: list[Instruction]) -> Instruction:
    if one.name not in KNOWN:
        raise one.refused(f"this check does not know the instruction; it knows {', '.join(KNOWN)}")
    if one.name in _ONCE and any(earlier.name == one.name for earlier in before):
        raise one.refused("this check knows it once in a file")
    if one.name == "WORKDIR" and not re.fullmatch(r"(/[\w-]+)+", one.rest):
        raise one.refused("this check knows an absolute path")
    if one.name in _CHECKS:
        _CHECKS[one.name](one)
    return one
