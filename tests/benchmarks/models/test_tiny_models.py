"""Tiny models hide nothing: no tensor is one value throughout, and the same seed gives the same model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.models.tiny_models import TINY_CONFIGS, save_tiny_model


@pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])
@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_no_tensor_is_constant(family: str, fused: bool, tmp_path: Path) -> None:
    path = save_tiny_model(family, tmp_path / "model", torch.float32, save_original_format=not fused)
    tensors = load_file(path / "model.safetensors")
    assert len(tensors) > 20
    # One number alone hides itself where it is 0 or 1.
    constant = [
        name
        for name, tensor in tensors.items()
        if len(tensor.unique()) == 1 and (tensor.numel() > 1 or tensor.item() in (0, 1))
    ]
    assert constant == []
    # ... and large values would make logits of rounding errors
    assert all(tensor.abs().max() < 8 for tensor in tensors.values())


def test_seeds(tmp_path: Path) -> None:
    first, again, other = (
        load_file(save_tiny_model("gpt_oss", tmp_path / str(number), torch.float32, seed) / "model.safetensors")
        for number, seed in enumerate([3, 3, 4])
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
