"""vLLM serves a checkpoint with its rest in codes as it serves its restored twin, and holds the rest in 8 bits."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.families import MAX_DEVIATION, vllm_logprobs
from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.config import make_config
from compress_tools.errors import CheckpointError
from compress_tools.format.rest import row_names
from compress_tools.pipeline import compress
from compress_tools.stored.checkpoint import ResMoECheckpoint
from compress_tools.stored.restore import restore
from resmoe_vllm import coded_rest
from tests.compress_tools.test_rest import edited
from tests.resmoe_vllm.serving import logprob_gaps, serve, serve_in_subprocess

pytestmark = pytest.mark.vllm
CODED = make_config(method="quantize", bits=8, center="none", workers=1, rest_bits=8)
# By family: config fields, and how many layers of vLLM's hold codes: fused matrices count once.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    # 3 layers of qkv and o, embedding (made without a quantisation), output layer
    "mixtral": ({}, 8),
    # a tied output layer holds its embedding's
    "qwen3_moe": ({"tie_word_embeddings": True}, 10),
    # latent attention (q, kv_a, kv_b, o), a dense first layer, shared experts
    "deepseek_v3": ({}, 20),
    # a state space beside attention; tied
    "granitemoehybrid": ({}, 14),
}


def twins(folder: Path, family: str, **changes: Any) -> tuple[Path, Path]:
    source = save_tiny_model(family, folder / "source", torch.float32, **changes)
    compress(source, folder / "small", CODED)
    restore(folder / "small", folder / "dense")
    return folder / "small", folder / "dense"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return twins(tmp_path_factory.mktemp("rest"), "mixtral")


@pytest.mark.parametrize("family", FAMILIES)
def test_served_as_its_restored_twin(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, layers = FAMILIES[family]
    small, dense = twins(tmp_path, family, **changes)
    held: list[bool] = []
    process = coded_rest._CodedMethod.process_weights_after_loading

    def watched(self: Any, layer: Any) -> None:
        process(self, layer)
        held.append(layer.weight.dtype == torch.int8)

    monkeypatch.setattr(coded_rest._CodedMethod, "process_weights_after_loading", watched)
    found = vllm_logprobs(small)
    assert sum(held) == layers
    assert (found - vllm_logprobs(dense)).abs().max() <= MAX_DEVIATION / 10


def test_codes_that_are_missing_are_refused(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    """By the layer's name, and not served with zeros or what memory held."""
    codes, _ = row_names("model.layers.1.self_attn.k_proj.weight")
    assert codes in ResMoECheckpoint(mixtral[0]).reader
    broken = edited(mixtral[0], tmp_path / "broken", codes, lambda tensor: tensor.fill_(-128))
    with pytest.raises(
        CheckpointError, match=r"layers.1.self_attn.qkv_proj: not all of its codes are in the checkpoint"
    ):
        vllm_logprobs(broken)
    gc.collect()


@pytest.mark.slow
def test_compiled_and_over_two_ranks(mixtral: tuple[Path, Path]) -> None:
    """Rows and columns of codes are sliced as weights are; the op goes through torch.compile."""
    small, dense = mixtral
    one = serve(dense, dtype="float32")
    for options in ({"tensor_parallel_size": 2}, {"enforce_eager": False}):
        binding = "0|1" if "tensor_parallel_size" in options else "0"
        other = serve_in_subprocess(small, binding, dtype="float32", **options)
        assert other.tokens == one.tokens
        assert max(logprob_gaps(one, other)) <= MAX_DEVIATION
