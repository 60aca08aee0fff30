"""GPT-OSS as it is published: mxfp4 experts with biases, through vLLM's own loader of the family."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.families import MAX_DEVIATION, vllm_logprobs
from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.architectures.gpt_oss import GPT_OSS
from compress_tools.config import make_config
from compress_tools.pipeline import compress
from compress_tools.source.design_matrix import rows_to_expert
from compress_tools.source.reader import CheckpointReader
from compress_tools.stored.checkpoint import ResMoECheckpoint
from compress_tools.stored.restore import restore
from compress_tools.stored.verify import verify

SIZE_E, SIZE_I, SIZE_H = 4, 32, 64


def save_published(path: Path) -> Path:
    """The tiny model in bf16 with random mxfp4 experts, named as on the hub."""
    save_tiny_model("gpt_oss", path, torch.bfloat16)
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        _, columns, rows = tensors.pop(name).shape
        shape = SIZE_E, rows, columns // 32
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(121, 124, shape, dtype=torch.uint8, generator=generator)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    block = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": block}))
    return path


def save_wide(dense: Path, small: Path, path: Path) -> Path:
    """The restored checkpoint in fp32: what is stored in bf16 adds up to more than bf16 holds."""
    checkpoint, reader = ResMoECheckpoint(small), CheckpointReader(dense)
    tensors = {name: reader.get(name) for name in reader.names}
    for layer in checkpoint.fmt.layers:
        experts = [
            rows_to_expert(checkpoint.expert(layer, expert), checkpoint.biases(layer, expert))
            for expert in range(SIZE_E)
        ]
        found = GPT_OSS.layouts[0].stored(f"model.layers.{layer}.mlp.experts.", experts)
        assert set(found) <= set(tensors)
        tensors |= found
    path.mkdir()
    (path / "config.json").write_text((dense / "config.json").read_text())
    save_file({name: tensor.float() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"factor_bits": 8, "center_bits": 8}], ids=["", "8bit"])
def test_a_published_checkpoint_equals_its_restored_twin(options: dict, tmp_path: Path) -> None:
    source = save_published(tmp_path / "source")
    small, dense = tmp_path / "small", tmp_path / "dense"
    compress(source, small, make_config(method="low-rank", **options))
    verify(small, source)
    restore(small, dense)
    found = vllm_logprobs(small)
    assert found.isfinite().all()
    assert (found - vllm_logprobs(save_wide(dense, small, tmp_path / "wide"))).abs().max() <= MAX_DEVIATION
    assert found.std() > 0.1


@pytest.mark.vllm
@pytest.mark.slow
def test_random_weights_need_no_loader(tmp_path: Path) -> None:
    """``--load-format dummy`` calls no weight loader."""
    small = tmp_path / "small"
    compress(save_published(tmp_path / "source"), small, make_config(method="prune"))
    assert vllm_logprobs(small, load_format="dummy").isfinite().all()
