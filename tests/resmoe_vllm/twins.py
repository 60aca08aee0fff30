"""Seeded tiny models in pairs: a ResMoE checkpoint and its twin, the restored weights as a plain checkpoint.

Written with ``compress_tools.format`` only, so that the plugin is tested against the format and not against
our writer.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from compress_tools.format.codec import Rows, encode_bitmap, restore_expert
from compress_tools.format.schema import (
    BitmapResidual,
    DenseCenter,
    ExpertNames,
    LayerSpec,
    LowRankResidual,
    Projection,
    ResMoEFormat,
)
from compress_tools.format.tensors import CENTER, DTYPES, U, V, tensor_name

GATE, UP, DOWN = PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, VOCAB = 128, 96, 4, 2, 256

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
HF_NAMES = ExpertNames(
    expert="model.layers.{layer}.mlp.experts.{expert}", projections={name: name for name in PROJECTIONS}
)
MIXTRAL_NAMES = ExpertNames(
    expert="model.layers.{layer}.block_sparse_moe.experts.{expert}",
    projections={GATE: "w1", UP: "w3", DOWN: "w2"},
)


def tiny_mixtral(num_layers: int) -> PreTrainedModel:
    """Random Mixtral."""
    config = MixtralConfig(
        **COMMON,
        num_hidden_layers=num_layers,
        intermediate_size=INTERMEDIATE,
        num_local_experts=EXPERTS,
        head_dim=64,
    )
    return MixtralForCausalLM(config)


def tiny_olmoe(num_layers: int) -> PreTrainedModel:
    """Random OLMoE."""
    config = OlmoeConfig(**COMMON, num_hidden_layers=num_layers, intermediate_size=INTERMEDIATE, num_experts=EXPERTS)
    return OlmoeForCausalLM(config)


def tiny_qwen3_moe(num_layers: int) -> PreTrainedModel:
    """Random Qwen3-MoE."""
    config = Qwen3MoeConfig(
        **COMMON,
        num_hidden_layers=num_layers,
        intermediate_size=INTERMEDIATE,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        head_dim=64,
        norm_topk_prob=True,
    )
    return Qwen3MoeForCausalLM(config)


FAMILIES: dict[str, tuple[Callable[[int], PreTrainedModel], ExpertNames]] = {
    "mixtral": (tiny_mixtral, MIXTRAL_NAMES),
    "olmoe": (tiny_olmoe, HF_NAMES),
    "qwen3_moe": (tiny_qwen3_moe, HF_NAMES),
}


def low_rank(rank: int, *projections: Projection) -> LowRankResidual:
    """A low-rank group."""
    return LowRankResidual(projections=projections, rank=rank)


def bitmap(values: int, *projections: Projection) -> BitmapResidual:
    """A bitmap group."""
    return BitmapResidual(projections=projections, values_per_expert=values)


def layer_spec(*residual: LowRankResidual | BitmapResidual, center: Sequence[Projection] = PROJECTIONS) -> LayerSpec:
    """A layer with the given residual groups."""
    return LayerSpec(center=(DenseCenter(projections=tuple(center)),) if center else (), residual=residual)


# every grouping, each kind of center, several ranks and counts in one model; layer 3 is left uncompressed
ALL_KINDS: dict[int, LayerSpec] = {
    0: layer_spec(low_rank(48, *PROJECTIONS)),
    1: layer_spec(low_rank(40, GATE, UP), low_rank(24, DOWN)),
    2: layer_spec(low_rank(40, GATE), low_rank(24, UP), low_rank(32, DOWN)),
    4: layer_spec(bitmap(9000, *PROJECTIONS)),
    5: layer_spec(bitmap(6001, GATE, UP), bitmap(3000, DOWN)),
    6: layer_spec(bitmap(5000, GATE), bitmap(3000, UP), bitmap(2001, DOWN), center=(UP,)),
    7: layer_spec(low_rank(24, DOWN, GATE), bitmap(5000, UP, DOWN), low_rank(64, UP), center=()),
}
NUM_LAYERS = 8


def truncated_svd(rows: Rows, rank: int, dtype: torch.dtype) -> dict[tuple[Projection, str], Tensor]:
    """The group's rows side by side, as U and one V per projection."""
    left, values, right = torch.linalg.svd(torch.cat(list(rows.values()), 1).float(), full_matrices=False)
    v = right[:rank].split([part.shape[1] for part in rows.values()], 1)
    stored = {(projection, V): part.to(dtype) for projection, part in zip(rows, v, strict=True)}
    return {**stored, (next(iter(rows)), U): (left[:, :rank] * values[:rank]).to(dtype)}


def keep_largest(rows: Rows, count: int) -> Rows:
    """Masks of the ``count`` largest entries over the group."""
    flat = torch.cat([part.flatten() for part in rows.values()]).abs()
    keep = torch.zeros(flat.numel(), dtype=torch.bool)
    keep[flat.topk(count).indices] = True
    sizes = [part.numel() for part in rows.values()]
    return {
        projection: mask.view_as(part) for (projection, part), mask in zip(rows.items(), keep.split(sizes), strict=True)
    }


def compress_layer(
    experts: list[Rows], spec: LayerSpec, dtype: torch.dtype
) -> tuple[dict[tuple[Projection, str], Tensor], list[dict[tuple[Projection, str], Tensor]]]:
    """Center (mean, no alignment) and residuals of one layer, as the format stores them.

    Args:
        experts: rows ``[I, H]`` of each expert.
        spec: how to store them.
        dtype: stored dtype.
    Returns:
        shared tensors, and the tensors of each expert, by (projection, suffix).
    """
    shared = {
        (projection, CENTER): torch.stack([rows[projection].float() for rows in experts]).mean(0).to(dtype)
        for part in spec.center
        for projection in part.projections
    }
    stored = []
    for rows in experts:
        left = {p: r.float() - (shared[p, CENTER].float() if (p, CENTER) in shared else 0) for p, r in rows.items()}
        tensors: dict[tuple[Projection, str], Tensor] = {}
        for part in spec.residual:
            group = {projection: left[projection] for projection in part.projections}
            if part.method == "low_rank":
                made = truncated_svd(group, part.rank, dtype)
                u = made[part.projections[0], U].float()
                for projection in part.projections:
                    left[projection] = left[projection] - u @ made[projection, V].float()
            else:
                keep = keep_largest(group, part.values_per_expert)
                made = encode_bitmap(group, keep, dtype)
                for projection in part.projections:
                    left[projection] = left[projection].masked_fill(keep[projection], 0)
            tensors.update(made)
        stored.append(tensors)
    return shared, stored


def write_checkpoint(folder: Path, config: PreTrainedConfig, tensors: dict[str, Tensor], block: dict | None) -> None:
    """config.json (with ``quantization_config`` if given) and one model.safetensors."""
    folder.mkdir(parents=True)
    fields = config.to_dict() | ({"quantization_config": block} if block else {})
    (folder / "config.json").write_text(json.dumps(fields, indent=1))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def write_twins(
    root: Path, family: str, dtype: str, layers: dict[int, LayerSpec], num_layers: int
) -> tuple[Path, Path]:
    """Write ``root/resmoe`` and ``root/twin``.

    Args:
        root: new folder.
        family: key of ``FAMILIES``.
        dtype: of the model and of what is stored.
        layers: the layers to compress.
        num_layers: the model's layers.
    Returns:
        the two folders.
    """
    torch.manual_seed(0)
    build, names = FAMILIES[family]
    model = build(num_layers).to(DTYPES[dtype])
    model.save_pretrained(root / "source")
    tensors = load_file(root / "source" / "model.safetensors")
    fmt = ResMoEFormat(
        written_by="tests",
        dtype=dtype,
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        names=names,
        layers=layers,
    )
    compressed, twin = dict(tensors), dict(tensors)
    for index, spec in layers.items():
        stems = [names.expert_stem(index, expert) for expert in range(EXPERTS)]
        experts = []
        for stem in stems:
            dense = {p: compressed.pop(f"{stem}.{disk}.weight") for p, disk in names.projections.items()}
            experts.append(dense | {DOWN: dense[DOWN].T})
        shared, stored = compress_layer(experts, spec, DTYPES[dtype])
        compressed |= {tensor_name(fmt, index, None, *key): tensor for key, tensor in shared.items()}
        for expert, stem in enumerate(stems):
            compressed |= {tensor_name(fmt, index, expert, *key): tensor for key, tensor in stored[expert].items()}
            restored = restore_expert(spec, shared, stored[expert], HIDDEN)
            for projection, disk in names.projections.items():
                rows = restored[projection].T if projection == DOWN else restored[projection]
                twin[f"{stem}.{disk}.weight"] = rows.to(DTYPES[dtype])
    write_checkpoint(root / "resmoe", model.config, compressed, fmt.model_dump(mode="json"))
    write_checkpoint(root / "twin", model.config, twin, None)
    return root / "resmoe", root / "twin"
