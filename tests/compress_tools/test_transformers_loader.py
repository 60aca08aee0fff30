"""ResMoE checkpoints in transformers: factored and restored modes give the restored checkpoint's logits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from benchmarks.tiny_models import TINY_CONFIGS, save_tiny_model
from compress_tools.config import make_config
from compress_tools.errors import FormatError
from compress_tools.factored_experts import FactoredExperts
from compress_tools.pipeline import compress
from compress_tools.restore import restore
from compress_tools.verify import verify


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return model(input_ids=tokens, decoder_input_ids=tokens[:, :9]).logits
        return model(tokens).logits


def load(path: Path, family: str) -> torch.nn.Module:
    auto = AutoModelForSeq2SeqLM if family == "switch_transformers" else AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize("family", sorted(set(TINY_CONFIGS) - {"deepseek"}))
@pytest.mark.parametrize("options", [{"method": "prune"}, {"method": "low-rank"}], ids=lambda o: o["method"])
def test_both_modes_equal_the_restored_checkpoint(family: str, options: dict[str, str], tmp_path: Path) -> None:
    source = save_tiny_model(family, tmp_path / "source", torch.float32)
    compress(source, tmp_path / "small", make_config(**options))
    verify(tmp_path / "small", source)
    restore(tmp_path / "small", tmp_path / "dense")
    expected = logits(load(tmp_path / "dense", family))
    assert (expected - logits(load(source, family))).abs().max() > 1e-3, "compression changed nothing to compare"
    factored = load(tmp_path / "small", family)
    assert any(isinstance(module, FactoredExperts) for module in factored.modules())
    torch.testing.assert_close(logits(factored), expected, rtol=1e-4, atol=1e-5)
    restored = factored.dequantize()
    assert not any(isinstance(module, FactoredExperts) for module in restored.modules())
    torch.testing.assert_close(logits(restored), expected, rtol=1e-5, atol=1e-6)


def test_residuals_stay_compressed_in_memory(tiny_olmoe: Path, tmp_path: Path) -> None:
    report = compress(tiny_olmoe, tmp_path / "small", make_config(method="low-rank"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    held = sum(
        buffer.nbytes
        for module in model.modules()
        if isinstance(module, FactoredExperts)
        for buffer in module.buffers()
    )
    assert held == report.expert_bytes_after


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


@pytest.mark.parametrize(
    "imports",
    ["import compress_tools, transformers", "import transformers, compress_tools"],
    ids=["before", "after"],
)
def test_registered_whichever_is_imported_first(imports: str) -> None:
    script = (
        f"{imports}\n"
        "from transformers import AutoModelForCausalLM, PreTrainedModel\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert 'resmoe' in AUTO_QUANTIZER_MAPPING"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_importing_alone_does_not_import_transformers() -> None:
    script = "import sys, compress_tools.cli; assert 'transformers' not in sys.modules, 'slow start'"
    subprocess.run([sys.executable, "-c", script], check=True)
