"""Ruined results: warned of loudly, refused as early as it is known, and never at the price of work that is done."""

import json
from pathlib import Path
from typing import Any

import pytest

from compress_tools.config import make_config
from compress_tools.damage import RUINED_ERROR, WARNED_ERROR, damage_warning
from compress_tools.planner.config import make_planner_config
from compress_tools.planner.plan_text import plan_text, predicted_errors
from compress_tools.planner.planner import find_plan
from compress_tools.source.reader import CheckpointReader
from tests.compress_tools.cli.conftest import Resmoe, resmoe

__all__ = ["resmoe"]

RUINING = ("--coders", "low-rank", "--center", "none", "--target-bytes-ratio", "0.03")
UNIFORM = ("--method", "low-rank", "--retain-ratio", "0.05", "--center", "none")
# Above the error of a warning, below that of a refusal.
WORN = ("--method", "low-rank", "--retain-ratio", "0.25", "--center", "none")


def stopping(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note each layer that is compressed."""
    from compress_tools import pipeline

    layers: list[int] = []
    compress_layer = pipeline.compress_layer

    def noted(*arguments: Any) -> Any:
        layers.append(arguments[2])
        return compress_layer(*arguments)

    monkeypatch.setattr(pipeline, "compress_layer", noted)
    return layers


def test_a_warning_says_how_bad_it_is() -> None:
    assert damage_warning({0: WARNED_ERROR, 1: 0.01}) is None
    assert "mean relative error 0.35: expect clearly worse answers" in str(damage_warning({0: 0.35, 1: 0.35}))
    assert "mean relative error 0.90: the model is ruined" in str(damage_warning({0: 0.9}))
    one = str(damage_warning({0: 0.01, 7: RUINED_ERROR + 0.1, 8: 0.01}))
    assert "(layers 7 are ruined): expect clearly worse answers" in one


def test_a_plan_that_ruins_is_refused_before_anything_is_compressed(
    resmoe: Resmoe, tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = stopping(monkeypatch)
    words = ("compress", tiny_mixtral, tmp_path / "small", *RUINING)
    code, stdout, stderr = resmoe(*words)
    assert (code, stdout, layers) == (2, "", [])
    said = stderr.splitlines()[-1]
    for part in (
        "is predicted: the model is ruined",
        "1 is what dropping all experts loses",
        "a larger --target-bytes-ratio or --target-size",
        "with --resume --force",
        str(tmp_path / "small.plan.yaml"),
    ):
        assert part in said
    assert not (tmp_path / "small").exists()
    # The plan is kept: nothing is measured again, and it is still known what it does.
    monkeypatch.setattr("compress_tools.planner.budget.find_plan", None)
    code, _, stderr = resmoe(*words, "--resume")
    assert (code, "is predicted" in stderr, layers) == (2, True, [])
    code, stdout, stderr = resmoe(*words, "--resume", "--force", "--json")
    assert (code, layers) == (0, [0, 1, 2]), stderr
    assert json.loads(stdout)["warning"].startswith("WARNING: mean relative error 0.")
    assert not (tmp_path / "small.plan.yaml").exists()
    assert resmoe("verify", tmp_path / "small", "--against", tiny_mixtral)[0] == 0


def test_plan_warns_and_writes(resmoe: Resmoe, tiny_mixtral: Path, tmp_path: Path) -> None:
    code, stdout, _ = resmoe("plan", tiny_mixtral, *RUINING, "--out", tmp_path / "plan.yaml")
    assert code == 0
    assert "WARNING: mean relative error" in stdout
    assert "the model is ruined" in stdout
    found = json.loads(resmoe("plan", tiny_mixtral, *RUINING, "--json")[1])
    assert found["warning"] in stdout
    fine = json.loads(resmoe("plan", tiny_mixtral, "--coders", "quantize", "--center", "none", "--json")[1])
    assert "warning" not in fine


def test_one_coder_that_ruins_ends_after_the_first_layer_and_goes_on_when_forced(
    resmoe: Resmoe, tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = stopping(monkeypatch)
    words = ("compress", tiny_mixtral, tmp_path / "small", *UNIFORM)
    code, stdout, stderr = resmoe(*words)
    assert (code, stdout, layers) == (2, "", [0])
    said = stderr.splitlines()[-1]
    assert "after 1 of 3 layers: the model is ruined" in said
    assert f"--resume --force goes on from {tmp_path / 'small.partial'}" in said
    assert not (tmp_path / "small").exists()
    assert resmoe(*words, "--resume")[0] == 2
    assert layers == [0]
    code, stdout, stderr = resmoe(*words, "--resume", "--force")
    assert (code, layers) == (0, [0, 1, 2]), stderr
    assert "WARNING: mean relative error" in stdout
    assert "WARNING: mean relative error" in (tmp_path / "small.log").read_text()
    # Said again by a run that finds it finished, and not refused: it is there.
    code, stdout, _ = resmoe(*words, "--resume")
    assert (code, "WARNING: mean relative error" in stdout) == (0, True)


def test_a_plan_by_hand_that_ruins_is_refused_once_it_is_certain(
    resmoe: Resmoe, tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = stopping(monkeypatch)
    assert resmoe("plan", tiny_mixtral, *RUINING, "--out", tmp_path / "plan.yaml")[0] == 0
    words = ("compress", tiny_mixtral, tmp_path / "small", "--plan", tmp_path / "plan.yaml")
    code, _, stderr = resmoe(*words)
    assert (code, "after 2 of 3 layers" in stderr or "after 3 of 3 layers" in stderr) == (2, True), stderr
    done = list(layers)
    assert resmoe(*words, "--resume", "--force")[0] == 0
    assert sorted(layers) == [0, 1, 2]
    assert layers[: len(done)] == done


def test_slices_and_merge_want_to_be_forced_too(resmoe: Resmoe, tiny_mixtral: Path, tmp_path: Path) -> None:
    words = ("compress", tiny_mixtral, tmp_path / "small", *UNIFORM, "--shard")
    assert resmoe(*words, "1/2")[0] == 2
    assert resmoe(*words, "1/2", "--resume", "--force")[0] == 0
    assert resmoe(*words, "2/2", "--force")[0] == 0
    code, _, stderr = resmoe("merge", tmp_path / "small", "--remove-slices")
    assert (code, "over all layers: the model is ruined" in stderr) == (2, True)
    assert not (tmp_path / "small").exists()
    code, stdout, stderr = resmoe("merge", tmp_path / "small", "--remove-slices", "--resume", "--force")
    assert code == 0, stderr
    assert "WARNING: mean relative error" in stdout
    assert resmoe("verify", tmp_path / "small")[0] == 0


def test_what_is_only_worn_is_warned_of(resmoe: Resmoe, tiny_mixtral: Path, tmp_path: Path) -> None:
    code, stdout, stderr = resmoe("compress", tiny_mixtral, tmp_path / "small", *WORN, "--json")
    assert code == 0, stderr
    report = json.loads(stdout)
    assert WARNED_ERROR < report["mean_relative_error"] <= RUINED_ERROR
    assert "expect clearly worse answers" in report["warning"]
    assert "warning" not in json.loads((tmp_path / "small" / "resmoe_report.json").read_text())


def test_a_plans_text_tells_the_errors_of_what_is_compressed(tiny_mixtral: Path) -> None:
    request = make_planner_config(target_bytes_ratio=0.5, coders="quantize", layer_bytes_ratio="1:1..1")
    config = make_config(center="none", workers=1)
    found = find_plan(CheckpointReader(tiny_mixtral), config, request)
    assert found.layers[1].spec is None
    expected = {layer: own.error for layer, own in found.layers.items() if own.spec is not None}
    assert predicted_errors(plan_text(found, config, request, "source", "")) == pytest.approx(expected, rel=1e-5)
