"""The microbenchmark of the CPU kernel's coders, at few rows."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.cpu_weights import main
from resmoe_vllm.kernels.cpu.build import missing_cpu_flags


@pytest.mark.skipif(bool(missing_cpu_flags()), reason="the processor has no C++ kernel")
def test_command(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    options = ["--coder", "trellis 4 bits", "--coder", "bitmap 25 %", "--rows", "256", "--memory", "4"]
    done = CliRunner().invoke(main, [*options, "--seconds", "0.02", "--patience", "0", "--json", str(file)])
    assert done.exit_code == 0, done.output
    rows = json.loads(file.read_text())["rows"]
    assert [row.get("coder") for row in rows] == ["trellis 4 bits"] * 2 + ["bitmap 25 %"] * 2 + [None] * 2
    assert all(row["value"] > 0 for row in rows[-2:])
