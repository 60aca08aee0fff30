"""A model repository of the test hub: commits, each with its files."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# As in git, where large files are stored elsewhere and the repository has their SHA-256.
LARGE_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pth")


@dataclass(frozen=True)
class HubFile:
    """One file of a commit."""

    content: bytes

    @property
    def blob_id(self) -> str:
        """Git's name of it."""
        return hashlib.sha1(f"blob {len(self.content)}\0".encode() + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        """SHA-256."""
        return hashlib.sha256(self.content).hexdigest()


@dataclass
class Repository:
    """A repository's history.

    Attributes:
        commits: files by name, by commit.
        revisions: commit by branch or tag.
        token: what a request must carry, if the repository is private or gated.
        gated: a request without the token is told that the repository is gated, not that there is none.
    """

    commits: dict[str, dict[str, HubFile]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False

    def commit(self, files: Mapping[str, "bytes | HubFile"], branch: str = "main") -> str:
        """Make a commit that consists of these files.

        Returns:
            its name.
        """
        made = {name: own if isinstance(own, HubFile) else HubFile(own) for name, own in files.items()}
        parts = [self.revisions.get(branch, ""), *(f"{name} {file.sha256}" for name, file in sorted(made.items()))]
        name = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        self.commits[name] = made
        self.revisions[branch] = name
        return name

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit means."""
        return self.revisions.get(revision, revision if revision in self.commits else None)

    def is_large(self, name: str) -> bool:
        """Whether a file is stored outside git."""
        return name.endswith(LARGE_SUFFIXES)

    def described(self, repo_id: str, commit: str) -> dict[str, object]:
        """What the hub's API says of a commit."""
        siblings = []
        for name, file in sorted(self.commits[commit].items()):
            entry: dict[str, object] = {"rfilename": name, "size": len(file.content), "blobId": file.blob_id}
            if self.is_large(name):
                entry["lfs"] = {"sha256": file.sha256, "size": len(file.content), "pointerSize": 134}
            siblings.append(entry)
        return {
            "_id": "0" * 24,
            "id": repo_id,
            "modelId": repo_id,
            "sha": commit,
            "private": self.token is not None,
            "gated": self.gated,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }


def files_of(directory: Path) -> dict[str, bytes]:
    """All files below a directory."""
    return {
        file.relative_to(directory).as_posix(): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }
