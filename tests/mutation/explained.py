"""Survivors that are no hole: edits that change nothing that is promised, each with its reason."""

from dataclasses import dataclass, field
from pathlib import Path

import yaml

FILE = Path(__file__).with_name("explained.yaml")


@dataclass
class Explanations:
    """Reasons by file and by the beginning of a mutant's text."""

    reasons: dict[str, dict[str, str]]
    used: set[tuple[str, str]] = field(default_factory=set)
    files: set[str] = field(default_factory=set)

    @classmethod
    def read(cls) -> "Explanations":
        """Read the list that lies beside this file."""
        return cls(yaml.safe_load(FILE.read_text(encoding="utf-8")) or {})

    def reason(self, file: str, key: str) -> str | None:
        """Why a mutant that no test sees is none, or None."""
        self.files.add(file)
        for start, reason in self.reasons.get(file, {}).items():
            if key.startswith(start):
                self.used.add((file, start))
                return reason
        return None

    def stale(self) -> list[str]:
        """Entries of the files looked at that fit no mutant that was tried."""
        return [
            f"{file}: {start}"
            for file, own in self.reasons.items()
            if file in self.files
            for start in own
            if (file, start) not in self.used
        ]
