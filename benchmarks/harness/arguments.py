"""What options of several commands take; whatever is wrong with it is a sentence."""

import argparse
from pathlib import Path


def minutes(text: str) -> float:
    """A number above 0; ``inf`` for no end.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number of minutes above 0, found {text!r}")
    return value


def count(text: str) -> int:
    """A whole number from 1 on.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text!r}")
    return int(text)


def made_folder(parser: argparse.ArgumentParser, folder: Path) -> Path:
    """The folder, made if it is not there; the command ends with a sentence where that can't be."""
    folder = folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--folder {folder}: {error.strerror}; name one that is there or can be made")
    return folder
