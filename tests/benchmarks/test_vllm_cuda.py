"""The check of vLLM's CUDA build, which no test can install: its rows, and what it does with a family that fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import vllm_cuda


def test_rows_of_each_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("built", "failed", "slow"):
        (tmp_path / family).mkdir()
        config = {"quantization_config": {"layers": {"0": {}, "1": {}}}}
        (tmp_path / family / "config.json").write_text(json.dumps(config))

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[:2] == [sys.executable, "-W"]
        family = Path(command[-1]).name
        if family == "slow":
            raise subprocess.TimeoutExpired(command, 1)
        found = json.dumps({"layers": 2, "traced": 2, "parameters": 9, "model": "Model"})
        return subprocess.CompletedProcess(command, family == "failed", f"a line\n{found}\n", "why\nAttributeError: x")

    monkeypatch.setattr(subprocess, "run", run)
    # for the environment's own look at git and the GPU, which ran before
    monkeypatch.setattr(vllm_cuda, "write_rows", lambda rows, path: path.write_text(str(len(rows))))
    rows = {row.name.partition(":")[0]: row for row in vllm_cuda.check(tmp_path, None, tmp_path / "rows.json")}
    assert (rows["built"].value, rows["built"].met, rows["built"].context["model"]) == (2, True, "Model")
    assert (rows["failed"].met, rows["failed"].context["said"]) == (False, "AttributeError: x")
    assert (rows["slow"].met, rows["slow"].context["said"]) == (False, "not built within 240 s")
    assert (tmp_path / "rows.json").read_text() == "3"
    (row,) = vllm_cuda.check(tmp_path, ["built"], None)
    assert row.met
