"""A single file that a command writes: refused in a sentence before the work, never left behind by the check."""

from pathlib import Path

import pytest

from compress_tools.errors import ConfigError
from compress_tools.output.output_file import check_output_file, write_output_file


def test_a_new_file_is_not_left_by_the_check(tmp_path: Path) -> None:
    check_output_file("--out", tmp_path / "plan.yaml")
    assert list(tmp_path.iterdir()) == []
    write_output_file("--out", tmp_path / "plan.yaml", "é\n")
    assert (tmp_path / "plan.yaml").read_text(encoding="utf-8") == "é\n"


def test_a_file_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("old")
    check_output_file("--out", tmp_path / "plan.yaml")
    assert (tmp_path / "plan.yaml").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "--out: an empty string"),
        ("missing/plan.yaml", "no directory"),
        ("folder", "is a directory"),
        ("full", "is no regular file"),
        ("x" * 300, "can't be written"),
    ],
)
def test_refused_before_the_work(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").symlink_to("/dev/full")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=words):
        check_output_file("--out", str(tmp_path / name) if name else "")
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"--out .*full: can't be written"):
        write_output_file("--out", tmp_path / "full", "text")
