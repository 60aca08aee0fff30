"""Bytes on disk, and `resmoe compress` as a process."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from benchmarks.models.prepared import compress, expert_bytes_on_disk
from compress_tools.errors import ResMoEError


def test_expert_bytes_of_a_sharded_model(tiny_mixtral: Path):
    config = json.loads((tiny_mixtral / "config.json").read_text())
    expert = 3 * config["hidden_size"] * config["intermediate_size"] * torch.float32.itemsize
    num_experts = config["num_hidden_layers"] * config["num_local_experts"]
    assert expert_bytes_on_disk(tiny_mixtral) == num_experts * expert


def test_only_routed_experts_count(tmp_path: Path):
    tensors = {
        "model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(4, 4),
        "model.layers.0.mlp.shared_experts.up_proj.weight": torch.zeros(8, 8),
        "model.layers.0.mlp.gate.weight": torch.zeros(8, 8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert expert_bytes_on_disk(tmp_path) == 64


def test_compressed_experts_are_smaller_and_a_failure_is_raised(tiny_mixtral: Path, tmp_path: Path):
    console = Console(quiet=True)
    compress(tiny_mixtral, tmp_path / "small", "--method", "low-rank", "--retain-ratio", "0.25", console=console)
    assert 0 < expert_bytes_on_disk(tmp_path / "small") < 0.6 * expert_bytes_on_disk(tiny_mixtral)
    with pytest.raises(ResMoEError, match="exit code 4"):
        compress(tmp_path / "missing", tmp_path / "other", console=console)
