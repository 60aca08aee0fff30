"""Random checkpoints have the layout of real ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner

from benchmarks.harness.shapes import SHAPES, MoEShape
from benchmarks.models.synthetic_checkpoint import main, write_compressed, write_dense
from compress_tools import register_with_transformers
from compress_tools.config import make_config
from compress_tools.errors import CheckpointError
from compress_tools.pipeline import compress
from compress_tools.source.reader import CheckpointReader


def tiny(name: str) -> MoEShape:
    return replace(SHAPES[name], hidden=64, intermediate=32, experts=4, top_k=2)


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "dense"
    write_dense(path, tiny("OLMoE-1B-7B"), layers=2)
    return path


@pytest.mark.parametrize("name", ["Mixtral-8x7B", "Qwen3-30B-A3B", "DeepSeekMoE-16B"])
def test_dense_twins_load_in_transformers(name: str, tmp_path: Path) -> None:
    write_dense(tmp_path / "dense", tiny(name), layers=2)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("method", ["prune", "low-rank", "quantize"])
def test_compressed_twins_are_laid_out_as_compress_does(olmoe: Path, method: str, tmp_path: Path) -> None:
    config = make_config(method=method)
    compress(olmoe, tmp_path / "real", config)
    write_compressed(tmp_path / "random", olmoe, method=method)
    real, random = CheckpointReader(tmp_path / "real"), CheckpointReader(tmp_path / "random")
    assert random.config == real.config
    assert {n: random.get(n).shape for n in random.names} == {n: real.get(n).shape for n in real.names}
    assert {n: random.get(n).dtype for n in random.names} == {n: real.get(n).dtype for n in real.names}


def test_compressed_twins_answer(olmoe: Path, tmp_path: Path) -> None:
    """Masks and value counts agree, so that the plugin and transformers can read them."""
    write_compressed(tmp_path / "small", olmoe, method="prune")
    register_with_transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize("options", [(), ("--method", "prune")], ids=["dense", "prune"])
def test_command(options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "OLMoE-1B-7B", tiny("OLMoE-1B-7B"))
    done = CliRunner().invoke(main, [str(tmp_path / "out"), "--layers", "1", *options], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stdout.startswith(f"{tmp_path / 'out'}: ")
    assert ("quantization_config" in CheckpointReader(tmp_path / "out").config) == bool(options)


def test_an_existing_directory_is_not_written_to(olmoe: Path) -> None:
    with pytest.raises(CheckpointError, match="is there already"):
        write_dense(olmoe, tiny("OLMoE-1B-7B"), layers=2)
