"""Nemotron-3 in vLLM: experts of two matrices and squared ReLU, Mamba2 beside them, and a latent space.

vLLM's description of a layer refuses such experts on a CPU, where its own kernels don't have them. Ours do, so the
platform tells that one module another name here; everything else is vLLM's own.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.families import MAX_DEVIATION, transformers_logprobs, vllm_logprobs
from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.config import make_config
from compress_tools.pipeline import compress
from compress_tools.stored.restore import restore


class _WithUngatedExperts:
    """A platform that says yes where ``FusedMoEConfig`` asks for one with experts that have no gate."""

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def is_cuda_alike(self) -> bool:
        return True


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({}, "prune"),
        ({"layers_block_type": ["full_attention", "moe", "full_attention", "moe"], "moe_latent_size": 32}, "low-rank"),
    ],
    ids=["nano", "latent"],
)
def test_experts_without_a_gate_equal_their_restored_twin(
    changes: dict[str, Any], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In transformers, as vLLM has no dense kernel for the twin here."""
    source = save_tiny_model("nemotron_h", tmp_path / "source", torch.float32, **changes)
    compress(source, tmp_path / "small", make_config(method=method))
    restore(tmp_path / "small", tmp_path / "dense")
    with pytest.raises(NotImplementedError, match="is_act_and_mul=False is supported only for"):
        vllm_logprobs(tmp_path / "small")
    from vllm.model_executor.layers.fused_moe import config

    monkeypatch.setattr(config, "current_platform", _WithUngatedExperts(config.current_platform))
    found = vllm_logprobs(tmp_path / "small")
    assert (found - transformers_logprobs(tmp_path / "dense")).abs().max() <= MAX_DEVIATION
    assert found.std() > 0.1
