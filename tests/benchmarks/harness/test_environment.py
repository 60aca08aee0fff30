"""What a row says of the command behind it."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from benchmarks.harness.environment import command_line

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("/somewhere/on this/rows.json", "rows.json"),
        ("--json=/somewhere/rows.json", "--json=rows.json"),
        ("small=/somewhere/small", "small=small"),
        ("results/rows.json", "results/rows.json"),
        ("org/model", "org/model"),
        ("0.5", "0.5"),
    ],
)
def test_absolute_paths_are_kept_by_name_alone(given: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", given])
    assert shlex.split(command_line())[-1] == kept


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.name)
def test_no_committed_row_names_a_folder_of_one_machine(file: Path) -> None:
    commands: set[str] = set()
    json.loads(file.read_text(), object_hook=lambda one: commands.add(one.get("command", "")) or one)
    words = [word for command in commands for word in shlex.split(command)]
    assert words
    assert [word for word in words if word.startswith("/") or "=/" in word] == []
