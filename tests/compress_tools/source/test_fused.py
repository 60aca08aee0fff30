"""Fused 3-D expert tensors read like experts stored one by one, and biases come along."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.models.tiny_models import NOT_IN_TRANSFORMERS, TINY_CONFIGS, save_tiny_model
from compress_tools.architectures.layouts import OneByOne
from compress_tools.architectures.registry import ARCHITECTURES
from compress_tools.config import make_config
from compress_tools.errors import NumericalError
from compress_tools.pipeline import compress
from compress_tools.source.moe_source import open_source
from compress_tools.source.reader import CheckpointReader
from compress_tools.stored.restore import restore
from compress_tools.stored.verify import verify
from tests.compress_tools.test_pipeline import logits

PUBLISHED_ONE_BY_ONE = {known.model_type for known in ARCHITECTURES if isinstance(known.layouts[0], OneByOne)}
# transformers calls all their tensors otherwise in its own layout, which nobody publishes.
RENAMED_THROUGHOUT = {"deepseek_v4", "minimax_m3_vl", "kimi_k25"}
FUSED = sorted(
    PUBLISHED_ONE_BY_ONE & set(TINY_CONFIGS) - {"switch_transformers"} - set(NOT_IN_TRANSFORMERS) - RENAMED_THROUGHOUT
)
# Kimi-Linear's and GLM-5.3-Flash's convolutions of query, key and value, which transformers makes one of.
JOINED = re.compile(r"\.self_attn\.[qkv]_conv1d\.")


@pytest.mark.parametrize("family", FUSED)
def test_fused_and_single_experts_are_the_same_experts(family: str, tmp_path: Path) -> None:
    single = open_source(CheckpointReader(save_tiny_model(family, tmp_path / "single", torch.float32)))
    path = save_tiny_model(family, tmp_path / "fused", torch.float32, save_original_format=False)
    fused = open_source(CheckpointReader(path))
    assert (single.stacked, fused.stacked) == (False, True)
    assert single.layers == fused.layers
    for layer in single.layers:
        for expert in range(single.sizes.num_experts):
            one, other = single.read_expert(layer, expert), fused.read_expert(layer, expert)
            for projection in single.projections:
                assert torch.equal(one.matrix(projection), other.matrix(projection))
    experts = {name for layer in single.layers for name in single.expected(layer)}
    copied = {name for name in single.reader.names if name not in experts and not JOINED.search(name)}
    renamed = {fused.output_name(name) for name in fused.reader.names}
    assert copied <= renamed


@pytest.mark.parametrize("hidden,inner", [(64, 24), (64, 32), (64, 64)], ids=["usual", "H = 2I", "H = I"])
def test_published_and_transformers_layout_of_qwen3_vl_are_told_apart(hidden: int, inner: int, tmp_path: Path) -> None:
    """One of the two tensors has the same shape in both layouts where H = 2I or H = I; never both."""
    sizes = {**TINY_CONFIGS["qwen3_vl_moe"][1]["text_config"], "hidden_size": hidden, "moe_intermediate_size": inner}
    published, own = (
        open_source(
            CheckpointReader(
                save_tiny_model(
                    "qwen3_vl_moe",
                    tmp_path / str(original),
                    torch.float32,
                    save_original_format=original,
                    text_config=sizes,
                )
            )
        )
        for original in (True, False)
    )
    name = "model.language_model.layers.1.mlp.experts.{}"
    assert published.reader.shape(name.format("gate_up_proj")) == (6, hidden, 2 * inner)
    assert own.reader.shape(name.format("gate_up_proj")) == (6, 2 * inner, hidden)
    module = own.reader.get(name.format("gate_up_proj"))[3]
    for source in (published, own):
        expert = source.read_expert(1, 3)
        assert torch.equal(torch.cat([expert.matrix("gate_proj"), expert.up]), module)
        assert torch.equal(expert.down, own.reader.get(name.format("down_proj"))[3])


def test_gpt_oss_keeps_its_biases_and_interleaving(tmp_path: Path) -> None:
    source = save_tiny_model("gpt_oss", tmp_path / "source", torch.float32)
    biases = [name for name in CheckpointReader(source).names if name.endswith(("gate_up_proj_bias", "down_proj_bias"))]
    assert len(biases) == 4
    assert all(CheckpointReader(source).get(name).count_nonzero() > 0 for name in biases)
    compress(source, tmp_path / "small", make_config(retain_ratio=1.0))
    verify(tmp_path / "small", source)
    restore(tmp_path / "small", tmp_path / "dense")
    assert CheckpointReader(tmp_path / "dense").names == CheckpointReader(source).names
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(source), rtol=1e-3, atol=1e-4)


def test_an_expert_of_gpt_oss_computes_what_transformers_does(tmp_path: Path) -> None:
    """Read from disk, gate and up with their own biases; the activation is the module's own."""
    path = save_tiny_model("gpt_oss", tmp_path / "source", torch.float32)
    module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).model.layers[1].mlp.experts
    source = open_source(CheckpointReader(path))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for expert in range(4):
        ids, weights = torch.full((5, 1), expert), torch.full((5, 1), 0.6)
        with torch.no_grad():
            expected = module(x, ids, weights)
            own = source.read_expert(1, expert)
            gate, up = x @ own.gate.T + own.biases["gate_proj"], x @ own.up.T + own.biases["up_proj"]
            limit = module.limit
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            activated = (up + 1) * gate * torch.sigmoid(gate * module.alpha)
            found = 0.6 * (activated @ own.down.T + own.biases["down_proj"])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


FUSED_TENSORS = [
    ("mixtral", "gate_up_proj"),
    ("mixtral", "down_proj"),
    ("gpt_oss", "gate_up_proj"),
    ("gpt_oss", "down_proj"),
    ("gpt_oss", "gate_up_proj_bias"),
    ("gpt_oss", "down_proj_bias"),
]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=["nan", "-inf"])
@pytest.mark.parametrize("family,tensor", FUSED_TENSORS)
def test_a_number_that_is_none_in_a_fused_tensor_is_refused(
    family: str, tensor: str, value: float, tmp_path: Path
) -> None:
    path = save_tiny_model(family, tmp_path / "source", torch.float32, save_original_format=False)
    tensors = load_file(path / "model.safetensors")
    name = next(name for name in tensors if name.endswith(f"layers.1.mlp.experts.{tensor}"))
    tensors[name][2].view(-1)[-1] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    source = open_source(CheckpointReader(path))
    source.read_expert(1, 1)
    with pytest.raises(NumericalError, match=f"{re.escape(name)}', expert 2, holds NaN or Inf"):
        source.read_expert(1, 2)
    with pytest.raises(NumericalError, match=re.escape(name)):
        compress(path, tmp_path / "small", make_config())
    assert not (tmp_path / "small").exists()
