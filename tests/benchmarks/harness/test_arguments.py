"""Options of several commands: what is taken, and the sentence for what is not."""

import argparse
from pathlib import Path

import pytest

from benchmarks.harness.arguments import count, made_folder, minutes


def test_what_is_taken(tmp_path: Path) -> None:
    assert (minutes("0.5"), minutes("inf"), count("64")) == (0.5, float("inf"), 64)
    folder = made_folder(argparse.ArgumentParser(), tmp_path / "a" / "b")
    assert folder.is_dir()


@pytest.mark.parametrize("text", ["0", "-1", "nan", "many", ""])
def test_minutes_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"above 0, found '{text}'"):
        minutes(text)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_counts_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"from 1 on, found '{text}'"):
        count(text)


def test_a_folder_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        made_folder(argparse.ArgumentParser(), tmp_path / "file")
    assert ended.value.code == 2
    assert f"--folder {tmp_path / 'file'}: File exists; name one" in capsys.readouterr().err
