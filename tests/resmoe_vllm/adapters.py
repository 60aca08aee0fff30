"""LoRA adapters of random weights, as PEFT writes them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK, ALPHA = 8, 16
ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")


def write_adapter(folder: Path, model: Mapping[str, torch.Tensor], layers: int, modules: Sequence[str]) -> Path:
    """An adapter on ``modules`` of every layer.

    Args:
        folder: new.
        model: the weights by name.
        layers: of the model.
        modules: below ``model.layers.N.``.
    Returns:
        the folder.
    """
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for layer in range(layers):
        for module in modules:
            name = f"model.layers.{layer}.{module}"
            rows, columns = model[f"{name}.weight"].shape
            for part, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = 0.1 * torch.randn(shape, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({module.split(".")[-1] for module in modules}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
