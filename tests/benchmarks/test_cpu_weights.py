"""The microbenchmark of the CPU kernel's coders, at few rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.cpu_weights import CODERS, main
from benchmarks.harness.shapes import MoEShape
from benchmarks.models.synthetic_layer import synthetic_format, synthetic_layer
from benchmarks.moe_cpu import METHODS
from resmoe_vllm.kernels.cpu.build import missing_cpu_flags


@pytest.mark.parametrize("options", [*METHODS.values(), *({**own, "center": "none"} for own in CODERS.values())])
def test_every_coder_has_a_layer(options: dict[str, Any]) -> None:
    layout, tensors = synthetic_layer(synthetic_format(MoEShape("tiny", 256, 64, 2, 1, 1), **options), 0)
    assert layout.bind(tensors).residual


@pytest.mark.skipif(bool(missing_cpu_flags()), reason="the processor has no C++ kernel")
def test_command(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    options = ["--coder", "trellis 4 bits", "--coder", "bitmap 25 %", "--rows", "256", "--memory", "4"]
    done = CliRunner().invoke(main, [*options, "--seconds", "0.02", "--patience", "0", "--json", str(file)])
    assert done.exit_code == 0, done.output
    rows = json.loads(file.read_text())["rows"]
    assert [row.get("coder") for row in rows] == ["trellis 4 bits"] * 2 + ["bitmap 25 %"] * 2 + [None] * 2
    assert all(row["value"] > 0 for row in rows[-2:])
