"""The import contracts of pyproject.toml hold, and fail when an arrow is turned round."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [command, "--no-cache"], cwd=directory, capture_output=True, text=True, env={"PYTHONPATH": str(directory)}
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("contracts")
    for package in ("compress_tools", "resmoe_vllm", "benchmarks"):
        shutil.copytree(REPO / package, target / package, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(REPO / "pyproject.toml", target)
    return target


def test_contracts_hold(copy: Path):
    done = lint_imports(copy)
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "turned"),
    [
        ("compress_tools/format/schema.py", "import compress_tools.source.reader"),
        ("compress_tools/source/reader.py", "import compress_tools.output.writer"),
        ("compress_tools/progress/listener.py", "import compress_tools.output.target"),
        ("compress_tools/output/outline.py", "import compress_tools.planner.plan_file"),
        ("compress_tools/residuals/base.py", "import compress_tools.cli.commands"),
        ("compress_tools/errors.py", "import resmoe_vllm.ops"),
        ("resmoe_vllm/fused_moe.py", "import compress_tools.source.reader"),
        ("resmoe_vllm/weights/layout.py", "import resmoe_vllm.ops"),
    ],
    ids=lambda value: value.rpartition("/")[2].removeprefix("import "),
)
def test_a_turned_arrow_fails(copy: Path, module: str, turned: str):
    file = copy / module
    text = file.read_text()
    try:
        file.write_text(f"{text}\n{turned}\n")
        done = lint_imports(copy)
    finally:
        file.write_text(text)
    assert done.returncode == 1
    assert "BROKEN" in done.stdout
    assert turned.removeprefix("import ") in done.stdout
