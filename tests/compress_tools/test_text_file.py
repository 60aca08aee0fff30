"""Text of strangers: regular files of bounded size, unless a user names a pipe."""

import os
import threading
from pathlib import Path

import pytest

from compress_tools import text_file
from compress_tools.errors import CheckpointError
from compress_tools.source.reader import CheckpointReader
from compress_tools.text_file import read_json_object, read_text


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    os.mkfifo(path)
    return path


def test_a_pipe_is_not_waited_for(pipe: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: is a pipe or a device; expected a text file"):
        read_json_object(pipe)
    with pytest.raises(CheckpointError, match=r"config\.json: is a pipe or a device"):
        CheckpointReader(pipe.parent)


def test_a_device_has_no_end(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"config\.json: is a pipe or a device"):
        read_json_object(tmp_path / "config.json")


def test_a_pipe_that_a_user_names_is_read(pipe: Path) -> None:
    writer = threading.Thread(target=pipe.write_text, args=("a text",))
    writer.start()
    assert read_text(pipe, may_be_piped=True) == "a text"
    writer.join()


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.json"
    file.write_text("{}  ")
    monkeypatch.setattr(text_file, "MOST_BYTES", 4)
    assert read_json_object(file) == {}
    file.write_text("{}   ")
    with pytest.raises(CheckpointError, match=r"is 5 bytes long; expected a text file of at most 4"):
        read_json_object(file)
    assert read_text(file, may_be_piped=True) == "{}   "


def test_a_sparse_file_takes_no_memory(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with file.open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(CheckpointError, match=r"1099511627776 bytes long"):
        read_json_object(file)
