"""Survivors that are no hole: edits that change nothing that is promised, each with its reason."""

from dataclasses import dataclass
from pathlib import Path

import yaml

FILE = Path(__file__).with_name("explained.yaml")


@dataclass(frozen=True)
class Explanations:
    """Reasons by file and by the beginning of a mutant's text."""

    reasons: dict[str, dict[str, str]]

    @classmethod
    def read(cls) -> "Explanations":
        """Read the list that lies beside this file."""
        return cls(yaml.safe_load(FILE.read_text(encoding="utf-8")) or {})

    def reason(self, file: str, key: str) -> str | None:
        """Why a mutant that no test sees is none, or None."""
        own = self.reasons.get(file, {})
        return next((reason for start, reason in own.items() if key.startswith(start)), None)

    def stale(self, file: str, keys: list[str]) -> list[str]:
        """Entries of a file that fit none of its mutants any more."""
        own = self.reasons.get(file, {})
        return [start for start in own if not any(key.startswith(start) for key in keys)]
