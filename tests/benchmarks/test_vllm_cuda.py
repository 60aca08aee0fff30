"""The check of vLLM's CUDA build, which no test can install: its rows, and what it does with a family that fails."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import vllm_cuda


def test_rows_of_each_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("built", "failed", "killed", "slow"):
        (tmp_path / family).mkdir()
        config = {"quantization_config": {"layers": {"0": {}, "1": {}}}}
        (tmp_path / family / "config.json").write_text(json.dumps(config))

    def build(model_dir: Path) -> dict[str, Any]:
        if model_dir.name == "slow":
            time.sleep(60)
        if model_dir.name == "failed":
            raise AttributeError("x")
        if model_dir.name == "killed":
            os._exit(3)
        return {"layers": 2, "traced": 2, "parameters": 9, "model": "Model"}

    monkeypatch.setattr(vllm_cuda, "build", build)
    monkeypatch.setattr(vllm_cuda, "prepare", lambda: None)
    monkeypatch.setattr(vllm_cuda, "SECONDS", 1)
    # for the environment's own look at git and the GPU, which ran before
    monkeypatch.setattr(vllm_cuda, "write_rows", lambda rows, path: path.write_text(str(len(rows))))
    rows = {row.name.partition(":")[0]: row for row in vllm_cuda.check(tmp_path, None, tmp_path / "rows.json")}
    assert (rows["built"].value, rows["built"].met, rows["built"].context["model"]) == (2, True, "Model")
    assert (rows["failed"].met, rows["failed"].context["said"]) == (False, "AttributeError: x")
    assert (rows["slow"].met, rows["slow"].context["said"]) == (False, "not built within 1 s")
    assert (rows["killed"].met, rows["killed"].context["said"]) == (False, "the process ended with 3")
    assert (tmp_path / "rows.json").read_text() == "4"
    (row,) = vllm_cuda.check(tmp_path, ["built"], None)
    assert row.met
