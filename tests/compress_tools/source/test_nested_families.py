"""Families within multimodal models, known by what config.json says of their language part; and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.config import make_config
from compress_tools.errors import UnsupportedArchitectureError
from compress_tools.pipeline import compress
from compress_tools.source.moe_source import open_source
from compress_tools.source.reader import CheckpointReader
from compress_tools.stored.restore import restore
from compress_tools.stored.verify import verify


def test_intern_s1_is_a_qwen3_moe_below_its_language_part(tmp_path: Path) -> None:
    """Published so: ``text_config`` says qwen3_moe, the language part lies beside a vision tower."""
    source = save_tiny_model("qwen3_moe", tmp_path / "source", torch.float32)
    text = json.loads((source / "config.json").read_text())
    config = {"model_type": "interns1", "architectures": ["InternS1ForConditionalGeneration"], "text_config": text}
    (source / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    renamed["model.vision_tower.embeddings.cls_token"] = torch.ones(1, 1, 8)
    save_file(renamed, source / "model.safetensors", metadata={"format": "pt"})
    found = open_source(CheckpointReader(source))
    assert (found.architecture.model_type, found.located.root) == ("qwen3_moe", "model.language_model.")
    assert found.layers == (0, 2)
    compress(source, tmp_path / "small", make_config(retain_ratio=1.0))
    verify(tmp_path / "small", source)
    restore(tmp_path / "small", tmp_path / "dense")
    assert CheckpointReader(tmp_path / "dense").names == CheckpointReader(source).names


def test_ernie_4_5_vl_is_refused_by_name(tmp_path: Path) -> None:
    """Two sets of experts in a layer: those for pictures come behind those for text, and are smaller."""
    source = save_tiny_model("ernie4_5_moe", tmp_path / "source", torch.float32)
    config = json.loads((source / "config.json").read_text())
    sizes = {"moe_num_experts": [6, 6], "moe_intermediate_size": [24, 12]}
    (source / "config.json").write_text(json.dumps({**config, **sizes, "model_type": "ernie4_5_vl_moe"}))
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        small = tensors[name][:, :12] if "down_proj" in name else tensors[name][:12]
        tensors[re.sub(r"experts\.(\d+)", lambda match: f"experts.{6 + int(match[1])}", name)] = small.clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedArchitectureError, match=r"'ernie4_5_vl_moe': its layers have two sets of experts"):
        compress(source, tmp_path / "small", make_config())
    assert not (tmp_path / "small").exists()
