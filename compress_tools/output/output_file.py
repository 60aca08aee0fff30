"""A single file that a command is asked to write: refused before the work where it could not be."""

from pathlib import Path

from compress_tools.errors import ConfigError
from compress_tools.text_file import in_words


def check_output_file(option: str, path: str | Path) -> None:
    """Refuse a file that could not be written, before the work.

    Raises:
        ConfigError: its directory does not exist or can't be written to, or it is a directory.
    """
    if not str(path):
        raise ConfigError(f"{option}: an empty string; name a file")
    file = Path(path).absolute()
    try:
        if not file.parent.is_dir():
            raise ConfigError(f"{option} {path}: no directory {file.parent}; make it first")
        if file.is_dir():
            raise ConfigError(f"{option} {path}: is a directory; name a file in it")
        existed = file.exists()
        if existed and not file.is_file():
            raise ConfigError(f"{option} {path}: is no regular file; choose another place")
        file.open("a").close()
    except OSError as err:
        raise ConfigError(f"{option} {path}: can't be written: {in_words(err)}; choose another place") from err
    if not existed:
        file.unlink()


def write_output_file(option: str, path: str | Path, text: str) -> None:
    """Write a file that ``check_output_file`` has passed.

    Raises:
        ConfigError: it can't be written now, such as on a full disk.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as err:
        raise ConfigError(f"{option} {path}: can't be written: {in_words(err)}; choose another place") from err
