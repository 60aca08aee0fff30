"""Checkpoints as their publishers write them, where transformers writes them otherwise or has no class.

Each function takes what transformers wrote and edits it in place.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

# Fields of a GLM-4-MoE config that what is made of it has, too.
GLM_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "first_k_dense_replace",
    "n_group",
    "topk_group",
    "hidden_act",
    "rms_norm_eps",
)

CONFIG_CODE = '''"""TITLE's configuration, as a checkpoint's own code."""
from transformers import PreTrainedConfig


class OwnConfig(PreTrainedConfig):
    model_type = "MODEL_TYPE"
'''


def _config_code(title: str, model_type: str) -> str:
    return CONFIG_CODE.replace("TITLE", title).replace("MODEL_TYPE", model_type)


def _deepseek_moe(path: Path, config: PreTrainedConfig, *, published: bool) -> None:  # noqa: ARG001  all are called alike
    """Turn a GLM-4-MoE checkpoint into DeepSeekMoE's original layout: plain softmax routing, its own config code."""
    tensors = load_file(path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "e_score_correction_bias" not in name}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    (path / "configuration_deepseek.py").write_text(_config_code("DeepSeekMoE", "deepseek"))
    fields = {
        **{key: getattr(config, key) for key in GLM_FIELDS},
        "model_type": "deepseek",
        "architectures": ["DeepseekForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_deepseek.OwnConfig"},
        "dtype": str(next(iter(kept.values())).dtype).removeprefix("torch."),
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


LING_ARCHITECTURES = {
    "bailing_moe": "BailingMoeV2ForCausalLM",
    "sarvam_moe": "SarvamMoEForCausalLM",
    "param2moe": "Param2MoEForCausalLM",
}
LING_NAMES = (
    ("self_attn.o_proj", "attention.dense"),
    ("self_attn.q_norm", "attention.query_layernorm"),
    ("self_attn.k_norm", "attention.key_layernorm"),
    ("model.embed_tokens", "model.word_embeddings"),
    ("mlp.gate.e_score_correction_bias", "mlp.gate.expert_bias"),
)


def _ling(family: str, path: Path, config: PreTrainedConfig, *, published: bool) -> None:  # noqa: ARG001  all are called alike
    """Turn a GLM-4-MoE checkpoint into Ling's layout, with the family's own config code."""
    tensors = load_file(path / "model.safetensors")
    for layer in range(config.num_hidden_layers):
        attention = f"model.layers.{layer}.self_attn"
        joined = torch.cat([tensors.pop(f"{attention}.{part}_proj.weight") for part in "qkv"])
        tensors[f"model.layers.{layer}.attention.query_key_value.weight"] = joined
    for old, new in LING_NAMES:
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    code = _config_code(LING_ARCHITECTURES[family].removesuffix("ForCausalLM"), family)
    (path / "configuration.py").write_text(code)
    fields = {
        **{key: getattr(config, key) for key in (*GLM_FIELDS, "head_dim", "use_qk_norm", "norm_topk_prob")},
        "model_type": family,
        "architectures": [LING_ARCHITECTURES[family]],
        "auto_map": {"AutoConfig": "configuration.OwnConfig"},
        "dtype": str(joined.dtype).removeprefix("torch."),
        "num_experts": config.n_routed_experts,
        "num_shared_experts": config.n_shared_experts,
        "routed_scaling_factor": 2.5,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "router_dtype": "fp32",
        "use_bias": False,
        "use_qkv_bias": False,
        "use_rmsnorm": True,
        "embedding_dropout": 0.0,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def _v4_name(name: str) -> str:
    """DeepSeek-V4's published name of a tensor that transformers writes below ``model.``."""
    name = name.removeprefix("model.").replace("embed_tokens", "embed")
    return name.replace("hc_head.hc_", "hc_head_").replace(".attn.norm.", ".attn.kv_norm.")


def _edit_tensors(path: Path, edit: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    file, found = path / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        found |= edit(name, tensor)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, file, metadata={"format": "pt"})


def _edit_config(path: Path, without: tuple[str, ...] = (), **changes: Any) -> None:
    file = path / "config.json"
    kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in without}
    file.write_text(json.dumps({**kept, **changes}, indent=2) + "\n")


def _qwen3_vl_moe(path: Path, config: PreTrainedConfig, *, published: bool) -> None:  # noqa: ARG001  all are called alike
    """Inputs come first in the experts' tensors."""
    if published:
        _edit_tensors(path, lambda name, tensor: {name: tensor.mT if ".mlp.experts." in name else tensor})


def _deepseek_v4(path: Path, config: PreTrainedConfig, *, published: bool) -> None:
    """Names without ``model.``; compression ratios instead of kinds of layers."""
    if not published:
        return
    _edit_tensors(path, lambda name, tensor: {_v4_name(name): tensor})
    ratios = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    _edit_config(
        path,
        without=("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters"),
        compress_ratios=[ratios[kind] for kind in config.layer_types],
        num_hash_layers=config.mlp_layer_types.count("hash_moe"),
        qk_rope_head_dim=config.qk_rope_head_dim,
        topk_method="noaux_tc",
        expert_dtype="bf16",
    )


def _kimi_k25(path: Path, config: PreTrainedConfig, *, published: bool) -> None:  # noqa: ARG001  all are called alike
    """The decoder has layers; transformers takes them for the vision tower's blocks."""
    if published:
        decoder = "language_model.model."
        _edit_tensors(path, lambda name, tensor: {name.replace(f"{decoder}blocks.", f"{decoder}layers."): tensor})


def _dense_layers_are_mlp(path: Path, config: PreTrainedConfig, *, published: bool) -> None:  # noqa: ARG001  all are called alike
    """Transformers writes dense layers as if they had experts."""
    dense = re.compile(r"\.block_sparse_moe\.(gate|up|down)_proj\.")
    _edit_tensors(path, lambda name, tensor: {dense.sub(r".mlp.\1_proj.", name): tensor})


def _axk1(path: Path, config: PreTrainedConfig, *, published: bool) -> None:  # noqa: ARG001  all are called alike
    """Dense layers have a norm, too, which nothing reads."""
    norm = f"model.layers.{{}}.{'' if published else 'mlp.'}post_mlp_layernorm.weight"
    _edit_tensors(
        path,
        lambda name, tensor: {name: tensor, **({norm.format(0): tensor + 1} if name == norm.format(1) else {})},
    )


def _longcat_flash(path: Path, config: PreTrainedConfig, *, published: bool) -> None:  # noqa: ARG001  all are called alike
    """Experts that compute nothing have no weights; transformers writes gates of them."""
    idle = tuple(f".experts.{config.n_routed_experts + number}." for number in range(config.zero_expert_num))
    _edit_tensors(path, lambda name, tensor: {} if any(part in name for part in idle) else {name: tensor})


def _nemotron_h(path: Path, config: PreTrainedConfig, *, published: bool) -> None:  # noqa: ARG001  all are called alike
    """The layers' kinds as letters; transformers writes a list."""
    kinds = config.layers_block_type
    _edit_config(path, hybrid_override_pattern=config.hybrid_override_pattern, num_hidden_layers=len(kinds))


def _phimoe(path: Path, config: PreTrainedConfig, *, published: bool) -> None:  # noqa: ARG001  all are called alike
    """The name that published Phi-3.5-MoE checkpoints, and vLLM, use."""
    _edit_config(path, architectures=["PhiMoEForCausalLM"])


# ``published``: not transformers' own stacked layout.
PUBLISH: dict[str, Callable[..., None]] = {
    "deepseek": _deepseek_moe,
    **{family: partial(_ling, family) for family in LING_ARCHITECTURES},
    "qwen3_vl_moe": _qwen3_vl_moe,
    "deepseek_v4": _deepseek_v4,
    "kimi_k25": _kimi_k25,
    "kimi_linear": _dense_layers_are_mlp,
    "minimax_m3_vl": _dense_layers_are_mlp,
    "axk1": _axk1,
    "longcat_flash": _longcat_flash,
    "nemotron_h": _nemotron_h,
    "phimoe": _phimoe,
}
