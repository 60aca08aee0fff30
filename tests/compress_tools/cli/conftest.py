"""The command, run in this process."""

import sys
from collections.abc import Callable

import pytest

from compress_tools.cli.commands import main

Resmoe = Callable[..., tuple[int, str, str]]


@pytest.fixture
def resmoe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Resmoe:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["resmoe", *map(str, words)])
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        return (int(str(code or 0)), *capsys.readouterr())

    return run
