"""ResMoE checkpoints in transformers: factored and restored modes give the restored checkpoint's logits."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from benchmarks.models.tiny_models import NOT_IN_TRANSFORMERS, TINY_CONFIGS, load_model, save_tiny_model, token_logits
from compress_tools import pipeline, register_with_transformers
from compress_tools.config import make_config
from compress_tools.errors import ConfigError, FormatError
from compress_tools.format.packing import pack_codes
from compress_tools.format.parts.quantized import CODES
from compress_tools.format.schema import (
    PROJECTIONS,
    ExpertGroup,
    LayerSpec,
    LowRankResidual,
    QuantizedCenter,
    QuantizedResidual,
)
from compress_tools.hf.factored_experts import FactoredExperts
from compress_tools.output.target import make_target
from compress_tools.pipeline import compress
from compress_tools.residuals.quantizer import quantize_rows
from compress_tools.source.reader import CheckpointReader
from compress_tools.stored.checkpoint import ResMoECheckpoint
from compress_tools.stored.restore import restore
from compress_tools.stored.verify import verify

register_with_transformers()


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    return token_logits(model, tokens, targets=tokens[:, :9])


@pytest.mark.parametrize("family", sorted(set(TINY_CONFIGS) - set(NOT_IN_TRANSFORMERS)))
@pytest.mark.parametrize("options", [{"method": "prune"}, {"method": "low-rank"}], ids=lambda o: o["method"])
def test_both_modes_equal_the_restored_checkpoint(family: str, options: dict[str, str], tmp_path: Path) -> None:
    source = save_tiny_model(family, tmp_path / "source", torch.float32)
    compress(source, tmp_path / "small", make_config(**options))
    verify(tmp_path / "small", source)
    restore(tmp_path / "small", tmp_path / "dense")
    expected = logits(load_model(tmp_path / "dense"))
    assert (expected - logits(load_model(source))).abs().max() > 1e-3, "compression changed nothing to compare"
    factored = load_model(tmp_path / "small")
    assert any(isinstance(module, FactoredExperts) for module in factored.modules())
    torch.testing.assert_close(logits(factored), expected, rtol=1e-4, atol=1e-5)
    restored = factored.dequantize()
    assert not any(isinstance(module, FactoredExperts) for module in restored.modules())
    torch.testing.assert_close(logits(restored), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", sorted(set(TINY_CONFIGS) - set(NOT_IN_TRANSFORMERS)))
def test_keeping_everything_keeps_the_sources_logits(family: str, tmp_path: Path) -> None:
    """Not the restored twin's: biases, routing weights and activation are the source's own."""
    source = save_tiny_model(family, tmp_path / "source", torch.float32)
    compress(source, tmp_path / "small", make_config(retain_ratio=1.0))
    expected = logits(load_model(source))
    torch.testing.assert_close(logits(load_model(tmp_path / "small")), expected, rtol=1e-4, atol=1e-4)


def test_experts_that_pass_their_input_on_do_so(tmp_path: Path) -> None:
    """LongCat's. transformers' class loads dense ones with gates for them, too, which it never uses."""
    published = save_tiny_model("longcat_flash", tmp_path / "published", torch.float32)
    compress(published, tmp_path / "small", make_config(retain_ratio=1.0))
    shutil.copytree(published, tmp_path / "filled")
    tensors = load_file(published / "model.safetensors")
    for layer in range(2):
        for name in (f"model.layers.{layer}.mlp.experts.{{}}.{part}_proj.weight" for part in ("gate", "up")):
            tensors |= {name.format(idle): torch.zeros_like(tensors[name.format(0)]) for idle in (6, 7)}
    save_file(tensors, tmp_path / "filled" / "model.safetensors", metadata={"format": "pt"})
    expected = logits(load_model(tmp_path / "filled"))
    factored = load_model(tmp_path / "small")
    torch.testing.assert_close(logits(factored), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(factored.dequantize()), expected, rtol=1e-4, atol=1e-4)


VERSION_2 = {
    "quantize": {"method": "quantize", "bits": 3, "group_size": 32, "center_bits": 8},
    "low-rank+quantize": {"method": "low-rank+quantize", "bits": 2, "retain_ratio": 0.2, "factor_bits": 8},
    "prune-4bit": {"value_bits": 4, "center_bits": 4},
    "prune-equal": {"prune_rows": "equal", "value_bits": 8, "center": "none"},
    "low-rank-each-8bit": {"method": "low-rank", "low_rank_form": "per-projection", "factor_bits": 8},
}


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
@pytest.mark.parametrize("coding", VERSION_2)
def test_coders_of_version_2_in_both_modes(family: str, coding: str, tmp_path: Path) -> None:
    test_both_modes_equal_the_restored_checkpoint(family, VERSION_2[coding], tmp_path)


def test_layers_of_different_coding_and_groups_of_experts(
    tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a planner may ask for: a spec for each layer, experts of one layer coded at different rates."""
    few = (QuantizedResidual(projections=PROJECTIONS, bits=2, group_size=32),)
    many = (
        LowRankResidual(projections=("up_proj",), rank=8),
        QuantizedResidual(projections=PROJECTIONS, bits=4),
    )
    groups = (ExpertGroup(experts=(3, 0), residual=few), ExpertGroup(experts=(1, 2), residual=many))
    specs = {
        0: LayerSpec(center=(QuantizedCenter(projections=("gate_proj", "down_proj"), bits=8),), groups=groups),
        2: LayerSpec(center=(), residual=few),
    }
    dense, small = tmp_path / "dense", tmp_path / "small"
    monkeypatch.setattr(pipeline, "make_target", partial(make_target, specs=specs))
    report = compress(tiny_mixtral, small, make_config())
    assert [layer.layer for layer in report.layers] == [0, 2]
    for verdict, layer in zip(verify(small, tiny_mixtral), report.layers, strict=True):
        assert verdict.relative_error == pytest.approx(layer.relative_error, rel=1e-3)
    restore(small, dense)
    expected = logits(load_model(dense))
    factored = load_model(small)
    torch.testing.assert_close(logits(factored), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(factored.dequantize()), expected, rtol=1e-5, atol=1e-6)
    # without a center rows keep their order: plain quantisation of the source's own rows
    name = "model.layers.2.block_sparse_moe.experts.1.w1.weight"
    codes, _ = quantize_rows(CheckpointReader(tiny_mixtral).get(name), 2, 32)
    assert torch.equal(ResMoECheckpoint(small).stored(2, 1)["gate_proj", CODES], pack_codes(codes, 2))


def test_a_spec_for_a_layer_without_experts_is_refused(tiny_mixtral: Path) -> None:
    spec = LayerSpec(center=(), residual=(QuantizedResidual(projections=PROJECTIONS, bits=2),))
    with pytest.raises(ConfigError, match=r"layers \[7\] have no experts"):
        make_target(CheckpointReader(tiny_mixtral), make_config(), {7: spec})
    with pytest.raises(ConfigError, match="no layer"):
        make_target(CheckpointReader(tiny_mixtral), make_config(), {})


def test_a_spec_with_a_center_needs_one_to_be_found(tiny_mixtral: Path) -> None:
    few = (QuantizedResidual(projections=PROJECTIONS, bits=2),)
    specs = {
        0: LayerSpec(center=(), residual=few),
        1: LayerSpec(center=(QuantizedCenter(projections=PROJECTIONS, bits=8),), residual=few),
    }
    with pytest.raises(ConfigError, match=r"layers \[1\] are to have a center, which --center none"):
        make_target(CheckpointReader(tiny_mixtral), make_config(center="none"), specs)


@pytest.mark.parametrize("coding", ["low-rank", *VERSION_2])
def test_residuals_stay_compressed_in_memory(coding: str, tiny_olmoe: Path, tmp_path: Path) -> None:
    options = VERSION_2.get(coding, {"method": coding})
    report = compress(tiny_olmoe, tmp_path / "small", make_config(**options))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    held = sum(
        buffer.nbytes
        for module in model.modules()
        if isinstance(module, FactoredExperts)
        for buffer in module.buffers()
    )
    assert held == report.expert_bytes_after


def test_dequantize_takes_a_dtype(tiny_mixtral: Path, tmp_path: Path) -> None:
    compress(tiny_mixtral, tmp_path / "small", make_config())
    restored = load_model(tmp_path / "small").dequantize(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in restored.parameters()} == {torch.bfloat16}
    expected = logits(load_model(tmp_path / "small"))
    torch.testing.assert_close(logits(restored).float(), expected, rtol=0.1, atol=0.1)


def test_base_model_and_uncompressed_layers(tiny_mixtral: Path, tmp_path: Path) -> None:
    compress(tiny_mixtral, tmp_path / "small", make_config(layers="1", center="none", retain_ratio=1.0))
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = AutoModel.from_pretrained(tiny_mixtral)(tokens).last_hidden_state
        found = AutoModel.from_pretrained(tmp_path / "small")(tokens).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_broken_checkpoint_is_refused(tiny_olmoe: Path, tmp_path: Path) -> None:
    compress(tiny_olmoe, tmp_path / "small", make_config())
    config = (tmp_path / "small" / "config.json").read_text()
    (tmp_path / "small" / "config.json").write_text(config.replace('"format_version": 2', '"format_version": 9'))
    with pytest.raises(FormatError, match="format_version 9"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")
