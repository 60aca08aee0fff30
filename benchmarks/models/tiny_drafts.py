"""Multi-token-prediction layers for tiny models, written beside them: transformers' classes have no weights for them.

Names are those of published checkpoints, values a seeded draw around a decoder layer's: the last, or for the families
whose drafts have no experts the first, which is dense.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Families whose drafts count from 0 under `mtp.`; others count on with the decoder's layers.
BELOW_MTP = ("qwen3_next", "qwen3_5_moe", "exaone_moe")
WITHOUT_EXPERTS = ("exaone_moe", "ernie4_5_moe", "mimo_v2_flash")
FILE = "model.safetensors"
# How far a draft's layers are from the last decoder layer, in its own deviations; near enough for hits.
SPREAD = 0.3


def add_draft(path: Path, family: str, seed: int = 1, *, stacked: bool = False) -> Path:
    """Give a tiny checkpoint one multi-token-prediction layer.

    Args:
        path: what ``save_tiny_model`` wrote, in one file; changed in place.
        family: its model_type.
        seed: of the random weights.
        stacked: experts of the draft in 3-D tensors, as Qwen3.6 has them.
    Returns:
        ``path``.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(path / FILE)
    config: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    dtype = tensors["model.embed_tokens.weight"].dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def near(own: Tensor) -> Tensor:
        spread = own.float().std() if own.numel() > 1 else 0.0
        return (own.float() + SPREAD * spread * normal(*own.shape)).to(own.dtype)

    model = f"model.layers.{0 if family in WITHOUT_EXPERTS else layers - 1}."
    block = {name.removeprefix(model): near(own) for name, own in tensors.items() if name.startswith(model)}
    if stacked:
        block = _stack(block)
    # The embedding's half, then the hidden state's: which alone says most of what comes next in a toy.
    joined = torch.cat([0.05 * normal(hidden, hidden), torch.eye(hidden) + 0.02 * normal(hidden, hidden)], 1)
    norms = {name: 1 + 0.1 * normal(hidden) for name in ("first", "second", "third")}
    if family in BELOW_MTP:
        before = "mtp.layers.0."
        # Qwen3-Next's norms multiply by 1 + weight.
        start = 0 if family.startswith("qwen3") else 1
        around = {
            "mtp.fc.weight": joined,
            "mtp.norm.weight": norms["first"] - 1 + start,
            "mtp.pre_fc_norm_hidden.weight": norms["second"] - 1 + start,
            "mtp.pre_fc_norm_embedding.weight": norms["third"] - 1 + start,
        }
    elif family == "ernie4_5_moe":
        before = "model.mtp_block.0."
        around = {
            "model.mtp_linear_proj.0.weight": joined,
            "model.mtp_emb_norm.0.weight": norms["first"],
            "model.mtp_hidden_norm.0.weight": norms["second"],
        }
    elif family == "mimo_v2_flash":
        before = "model.mtp.layers.0."
        # Its attention has a window, and so sinks.
        block["self_attn.attention_sink_bias"] = normal(config["num_attention_heads"]).to(dtype)
        block["pre_mlp_layernorm.weight"] = block.pop("post_attention_layernorm.weight")
        around = {
            f"{before}eh_proj.weight": joined,
            f"{before}enorm.weight": norms["first"],
            f"{before}hnorm.weight": norms["second"],
            f"{before}final_layernorm.weight": norms["third"],
        }
    else:
        before = f"model.layers.{layers}."
        final = "final_layernorm.weight" if family == "hy_v3" else "shared_head.norm.weight"
        around = {
            f"{before}eh_proj.weight": joined,
            f"{before}enorm.weight": norms["first"],
            f"{before}hnorm.weight": norms["second"],
            f"{before}{final}": norms["third"],
        }
    tensors |= {before + name: own for name, own in block.items()}
    tensors |= {name: own.to(dtype) for name, own in around.items()}
    save_file(tensors, path / FILE, metadata={"format": "pt"})
    config["num_nextn_predict_layers"] = 1
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path


def _stack(block: dict[str, Tensor]) -> dict[str, Tensor]:
    """One by one to ``gate_up_proj`` ``[E, 2I, H]`` and ``down_proj`` ``[E, H, I]``."""
    stem = "mlp.experts."
    count = 1 + max(int(name.split(".")[2]) for name in block if name.startswith(stem))

    def all_of(projection: str) -> Tensor:
        return torch.stack([block[f"{stem}{expert}.{projection}.weight"] for expert in range(count)])

    rest = {name: own for name, own in block.items() if not name.startswith(stem)}
    gate_up = torch.cat([all_of("gate_proj"), all_of("up_proj")], 1)
    return {**rest, f"{stem}gate_up_proj": gate_up, f"{stem}down_proj": all_of("down_proj")}
