"""Fused 3-D expert tensors read like experts stored one by one, and biases come along."""

from pathlib import Path

import pytest
import torch

from benchmarks.models.tiny_models import TINY_CONFIGS, save_tiny_model
from compress_tools.config import make_config
from compress_tools.pipeline import compress
from compress_tools.source.moe_source import open_source
from compress_tools.source.reader import CheckpointReader
from compress_tools.stored.restore import restore
from compress_tools.stored.verify import verify
from tests.compress_tools.test_pipeline import logits

FUSED = sorted(set(TINY_CONFIGS) - {"gpt_oss", "switch_transformers", "deepseek"})


@pytest.mark.parametrize("family", FUSED)
def test_fused_and_single_experts_are_the_same_experts(family: str, tmp_path: Path) -> None:
    single = open_source(CheckpointReader(save_tiny_model(family, tmp_path / "single", torch.float32)))
    path = save_tiny_model(family, tmp_path / "fused", torch.float32, save_original_format=False)
    fused = open_source(CheckpointReader(path))
    assert (single.fused, fused.fused) == (False, True)
    assert single.layers == fused.layers
    for layer in single.layers:
        for expert in range(single.sizes.num_experts):
            one, other = single.read_expert(layer, expert), fused.read_expert(layer, expert)
            for projection in single.projections:
                assert torch.equal(one.matrix(projection), other.matrix(projection))
    experts = {name for layer in single.layers for name in single.expected(layer)}
    copied = set(single.reader.names) - experts
    renamed = {fused.output_name(name) for name in fused.reader.names}
    assert copied <= renamed


def test_gpt_oss_keeps_its_biases_and_interleaving(tmp_path: Path) -> None:
    source = save_tiny_model("gpt_oss", tmp_path / "source", torch.float32)
    compress(source, tmp_path / "small", make_config(retain_ratio=1.0))
    verify(tmp_path / "small", source)
    restore(tmp_path / "small", tmp_path / "dense")
    assert CheckpointReader(tmp_path / "dense").names == CheckpointReader(source).names
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(source), rtol=1e-3, atol=1e-4)
