"""The commands of a newcomer and of CI: what they run, without running it."""

import os
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("venv", "docker/install.sh cpu no-such-venv --editable"),
        ("test", "OMP_NUM_THREADS=1 no-such-venv/bin/python -m pytest -n 2 --dist loadfile"),
        ("demo", "no-such-venv/bin/resmoe demo"),
        ("check", "no-such-venv/bin/ruff check ."),
        ("sbom", "no-such-venv/bin/python docker/sbom.py no-such-venv build/sbom"),
        ("image-check", "no-such-venv/bin/python -m tests.packaging.image_check"),
        ("release-check", "no-such-venv/bin/python -m tests.packaging.release_check"),
        (
            "recovery",
            f"OMP_NUM_THREADS=1 PYTHONPATH={REPO}/build/lm-eval/site-packages "
            "no-such-venv/bin/python -m benchmarks.recovery",
        ),
        ("soak", "OMP_NUM_THREADS=1 no-such-venv/bin/python -m benchmarks.soak"),
        (
            "cover",
            " ".join(
                f"tests/compress_tools/{name}" for name in ("format", "output", "slices", "source", "test_pipeline.py")
            ),
        ),
    ],
)
def test_each_target_installs_first(target: str, command: str):
    # `make test` hands its own variables down, and with MAKELEVEL an inner make prints the directory that it enters.
    shell = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "--dry-run", target, "VENV=no-such-venv"],
        cwd=REPO,
        env=shell,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "docker/install.sh cpu no-such-venv --editable"
    assert command in [line.strip() for line in lines]


def test_ci_runs_the_commands_of_a_newcomer():
    script = REPO / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[-4:] == ["make venv", "make check", "make cover", "make test"]
    assert any(line.startswith("unset MAKEFLAGS MAKELEVEL ") for line in lines)
