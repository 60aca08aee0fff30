"""One calibration of the trained tiny Mixtral, shared."""

from pathlib import Path

import pytest

from compress_tools.calibration.calibrate import calibrate
from compress_tools.calibration.config import make_calibration_config


@pytest.fixture(scope="package")
def text(trained: tuple[Path, Path]) -> Path:
    """A text in the trained model's tokens."""
    return trained[0] / "heldout.txt"


@pytest.fixture(scope="package")
def made(trained: tuple[Path, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the trained model, with coefficients."""
    out = tmp_path_factory.mktemp("calibration") / "calibration.safetensors"
    calibrate(trained[0], out, make_calibration_config(text=str(text), max_tokens=2000, coefficients=True))
    return out
