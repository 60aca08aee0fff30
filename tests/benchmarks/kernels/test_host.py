"""The host's time of a call is measured through Triton's own launcher, without a GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.environment import REPO


@pytest.mark.skipif(shutil.which("gcc") is None, reason="builds what stands for the driver")
def test_a_call_is_measured(tmp_path: Path) -> None:
    """The time depends on the machine's load, so that it was taken is all that is held."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernels.host", "--method", "low-rank", "--tokens", "1"]
    command += ["--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["name"] == "OLMoE-1B-7B low-rank T=1: host time of a call"
    assert row["value"] > 0


def test_the_interpreter_is_refused() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernels.host"]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unset TRITON_INTERPRET" in done.stderr
