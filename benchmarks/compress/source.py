"""One MoE layer at a true shape as a checkpoint on disk: experts that share nothing, or noisy copies of one."""

import json
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import save_file

from benchmarks.harness.shapes import MoEShape

Kind = Literal["near-copied", "unrelated"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Noise of a near copy relative to the weight: residuals then hold 0.35^2 / (1 + 0.35^2) = 11 % of the energy.
NOISE = 0.35

HEAD_DIM = 8  # of the one attention head

PROJECTIONS = {"w1": False, "w3": False, "w2": True}  # Mixtral's names; True: [H, I]


def write_source(path: Path, shape: MoEShape, kind: Kind, seed: int = 0) -> None:
    """Write a one-layer checkpoint of random gaussian experts, bf16, one shard for each expert.

    Rows have varying norms, as trained weights have: assignments of equal norms are easier to solve.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator)

    path.mkdir(parents=True)
    scale = 0.02 * torch.exp(0.3 * normal(shape.intermediate, 1))
    base = {name: scale * normal(shape.intermediate, shape.hidden) for name in PROJECTIONS}
    weight_map: dict[str, str] = {}
    for expert in range(shape.experts):
        tensors = {}
        if kind == "unrelated":
            scale = 0.02 * torch.exp(0.3 * normal(shape.intermediate, 1))
        for name, transposed in PROJECTIONS.items():
            rows = scale * normal(shape.intermediate, shape.hidden)
            if kind == "near-copied":
                rows = base[name] + NOISE * rows
            full = f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight"
            tensors[full] = (rows.T if transposed else rows).bfloat16().contiguous()
        shard = f"expert-{expert}.safetensors"
        save_file(tensors, path / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))
    # What stands around the experts, as small as it may be: no stage measures it.
    sizes = {
        "model.embed_tokens": (1, shape.hidden),
        **{f"model.layers.0.self_attn.{name}_proj": (HEAD_DIM, shape.hidden) for name in "qkv"},
        "model.layers.0.self_attn.o_proj": (shape.hidden, HEAD_DIM),
        "model.layers.0.input_layernorm": (shape.hidden,),
        "model.layers.0.post_attention_layernorm": (shape.hidden,),
        "model.layers.0.block_sparse_moe.gate": (shape.experts, shape.hidden),
        "model.norm": (shape.hidden,),
        "lm_head": (1, shape.hidden),
    }
    around = {f"{name}.weight": torch.zeros(size, dtype=torch.bfloat16) for name, size in sizes.items()}
    save_file(around, path / "around.safetensors", metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(around, "around.safetensors"))
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "vocab_size": 1,
        "torch_dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
