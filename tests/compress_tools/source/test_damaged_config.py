"""Counts in a damaged config.json are refused at once, however large."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.errors import CheckpointError, UnsupportedArchitectureError
from compress_tools.source.moe_source import open_source
from compress_tools.source.reader import CheckpointReader

HUGE = 10**12


def with_config(source: Path, target: Path, **changes: object) -> CheckpointReader:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return CheckpointReader(target)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts", "hidden_size", "intermediate_size"])
@pytest.mark.parametrize("value", [HUGE, "x", 0, -1, True, 2.5, [1], [], {}], ids=repr)
def test_a_count_that_is_none(key: str, value: object, tiny_olmoe: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=rf"config.json: {key} .*expected a positive whole number"):
        open_source(with_config(tiny_olmoe, tmp_path / "x", **{key: value}))


def test_more_experts_than_tensors(tiny_olmoe: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="layer 0: not all 100000 experts are complete"):
        open_source(with_config(tiny_olmoe, tmp_path / "x", num_experts=100_000))


@pytest.mark.parametrize("value", [None, HUGE, "x"], ids=repr)
def test_an_encoder_decoders_layers(value: object, tmp_path: Path) -> None:
    source = save_tiny_model("switch_transformers", tmp_path / "model", torch.float32)
    with pytest.raises(
        UnsupportedArchitectureError, match=r"config.json: num_layers .*expected a positive whole number"
    ):
        open_source(with_config(source, tmp_path / "x", num_layers=value))
