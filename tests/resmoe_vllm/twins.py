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

from compress_tools.format.codec import restore_center, restore_expert
from compress_tools.format.dtypes import DTYPES
from compress_tools.format.packing import pack_codes
from compress_tools.format.parts.base import Rows
from compress_tools.format.parts.bitmap import (
    ROW_VALUE_CODES,
    ROW_VALUES,
    VALUE_CODES,
    VALUE_SCALES,
    VALUES,
    encode_bitmap,
    encode_row_bitmap,
)
from compress_tools.format.parts.dense import CENTER
from compress_tools.format.parts.low_rank import U_CODES, U_SCALES, V_CODES, V_SCALES, U, V
from compress_tools.format.parts.quantized import CENTER_CODES, CENTER_SCALES, CODES, SCALES
from compress_tools.format.parts.trellis import CENTER_TRELLIS, CENTER_TRELLIS_SCALES, TRELLIS, TRELLIS_SCALES
from compress_tools.format.schema import (
    BitmapResidual,
    DenseCenter,
    ExpertGroup,
    ExpertNames,
    LayerSpec,
    LowRankResidual,
    Projection,
    QuantizedCenter,
    QuantizedResidual,
    ResidualPart,
    ResMoEFormat,
    RowBitmapResidual,
    TrellisCenter,
    TrellisResidual,
    version_for,
)
from compress_tools.format.tensors import tensor_name
from compress_tools.format.trellis_tables import TABLES

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


def low_rank(rank: int, *projections: Projection, bits: int | None = None) -> LowRankResidual:
    """A low-rank group."""
    return LowRankResidual(projections=projections, rank=rank, factor_bits=bits)


def bitmap(values: int, *projections: Projection, bits: int | None = None, by: int | None = None) -> BitmapResidual:
    """A bitmap group; ``bits`` of a value, ``by`` columns that share a scale."""
    return BitmapResidual(projections=projections, values_per_expert=values, value_bits=bits, group_size=by)


def row_bitmap(
    values: int, *projections: Projection, bits: int | None = None, by: int | None = None
) -> RowBitmapResidual:
    """A bitmap group with ``values`` in every row."""
    return RowBitmapResidual(projections=projections, values_per_row=values, value_bits=bits, group_size=by)


def quantized(bits: int, *projections: Projection, by: int | None = None) -> QuantizedResidual:
    """A quantised group."""
    return QuantizedResidual(projections=projections, bits=bits, group_size=by)


def trellis(bits: int, *projections: Projection, by: int | None = None) -> TrellisResidual:
    """A group in trellis codes."""
    return TrellisResidual(projections=projections, bits=bits, group_size=by)


def layer_spec(
    *residual: ResidualPart, center: Sequence[Projection] = PROJECTIONS, bits: int = 16, by_trellis: bool = False
) -> LayerSpec:
    """A layer with the given residual groups, and a center of ``bits`` bits."""
    return LayerSpec(center=_center(center, bits, by_trellis=by_trellis), residual=residual)


def grouped_spec(
    *groups: tuple[tuple[int, ...], tuple[ResidualPart, ...]],
    center: Sequence[Projection] = PROJECTIONS,
    bits: int = 16,
) -> LayerSpec:
    """A layer whose experts are coded in groups: (experts, residual) each."""
    coded = tuple(ExpertGroup(experts=experts, residual=residual) for experts, residual in groups)
    return LayerSpec(center=_center(center, bits), groups=coded)


def _center(
    center: Sequence[Projection], bits: int, *, by_trellis: bool = False
) -> tuple[DenseCenter | QuantizedCenter | TrellisCenter, ...]:
    if not center:
        return ()
    if by_trellis:
        return (TrellisCenter(projections=tuple(center), bits=bits, group_size=32),)
    if bits == 16:
        return (DenseCenter(projections=tuple(center)),)
    return (QuantizedCenter(projections=tuple(center), bits=bits, group_size=64),)


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

# what version 2 of the format added, mixed over the layers and over the experts of a layer
VERSION_2_KINDS: dict[int, LayerSpec] = {
    0: layer_spec(quantized(4, *PROJECTIONS, by=64), bits=8),
    1: grouped_spec(
        ((0, 3), (quantized(8, GATE, UP), row_bitmap(70, DOWN, bits=8))),
        ((1,), (low_rank(48, *PROJECTIONS, bits=8), quantized(3, *PROJECTIONS, by=32))),
        ((2,), (bitmap(20000, *PROJECTIONS, bits=4, by=32),)),
        bits=4,
    ),
    2: layer_spec(row_bitmap(80, *PROJECTIONS), center=(GATE, DOWN)),
    3: layer_spec(low_rank(40, *PROJECTIONS), quantized(2, UP, GATE), bitmap(6000, DOWN, bits=8), center=()),
}
# trellis codes of every width, in a center, with another coder and by groups of experts
VERSION_3_KINDS: dict[int, LayerSpec] = {
    4: layer_spec(trellis(4, *PROJECTIONS), bits=8),
    5: grouped_spec(
        ((0, 3), (trellis(2, GATE, UP, by=32), quantized(4, DOWN))),
        ((1, 2), (low_rank(24, *PROJECTIONS, bits=8), trellis(3, *PROJECTIONS, by=64))),
        bits=4,
    ),
    7: layer_spec(trellis(1, *PROJECTIONS), bits=4, by_trellis=True),
}


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


def to_codes(rows: Tensor, bits: int, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Codes uint8 ``[I, C]``, not packed, and scales, by the largest magnitude: the plainest quantiser there is."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % (group_size or rows.shape[1])))
    groups = padded.unflatten(1, (-1, group_size or rows.shape[1]))
    scales = (groups.abs().amax(-1) / (2**bits - 1) * 2).clamp_min(1e-12).bfloat16()
    codes = (groups / scales.float().unsqueeze(-1) + (2**bits - 1) / 2).round().clamp(0, 2**bits - 1)
    return codes.byte().flatten(1)[:, : rows.shape[1]], scales


def coded(key: tuple[Projection, str], scales_key: tuple[Projection, str], rows: Tensor, bits: int, by: int | None):
    """Packed codes and scales of a matrix, by name."""
    codes, scales = to_codes(rows, bits, by)
    return {key: pack_codes(codes, bits), scales_key: scales}


def to_symbols(rows: Tensor, bits: int, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Symbols uint8 ``[I, C]``, not packed, and scales: column by column the symbol whose level is nearest."""
    tables, width = torch.tensor(TABLES[bits]), 3 if bits == 3 else 4
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % (group_size or rows.shape[1])))
    groups = padded.unflatten(1, (-1, group_size or rows.shape[1]))
    scales = (groups.abs().amax(-1) / 100).clamp_min(1e-12).bfloat16()
    wanted = (groups / scales.float().unsqueeze(-1)).flatten(1)[:, : rows.shape[1]]
    state, offered = torch.zeros(len(rows), 1, dtype=torch.int64), torch.arange(2**bits)
    symbols = torch.empty(rows.shape, dtype=torch.uint8)
    for column in range(rows.shape[1]):
        states = (state << bits | offered) % 4096  # [I, 2**bits]
        levels = sum(table[states >> width * field & 2**width - 1] for field, table in enumerate(tables))
        best = (levels - wanted[:, column, None]).abs().argmin(1, keepdim=True)
        symbols[:, column] = best[:, 0]
        state = states.gather(1, best)
    return symbols, scales


def encode_part(part: ResidualPart, rows: Rows, dtype: torch.dtype) -> dict[tuple[Projection, str], Tensor]:
    """One part of one expert, as the format stores it; ``rows`` of the part's projections."""
    stored: dict[tuple[Projection, str], Tensor] = {}
    first = part.projections[0]
    if part.method == "quantized":
        for p, own in rows.items():
            stored |= coded((p, CODES), (p, SCALES), own, part.bits, part.group_size)
    elif part.method == "trellis":
        for p, own in rows.items():
            symbols, scales = to_symbols(own, part.bits, part.group_size)
            stored |= {(p, TRELLIS): pack_codes(symbols, part.bits), (p, TRELLIS_SCALES): scales}
    elif part.method == "low_rank":
        stored = truncated_svd(rows, part.rank, dtype)
        if part.factor_bits is not None:
            stored = coded((first, U_CODES), (first, U_SCALES), stored.pop((first, U)).float(), 8, None) | {
                key: tensor
                for (p, _), own in stored.items()
                for key, tensor in coded((p, V_CODES), (p, V_SCALES), own.float(), 8, None).items()
            }
    else:
        by_row = part.method == "bitmap_rows"
        keep = (
            {p: keep_largest_of_rows(own, part.values_per_row) for p, own in rows.items()}
            if by_row
            else keep_largest(rows, part.values_per_expert)
        )
        encode, plain, in_codes = (
            (encode_row_bitmap, ROW_VALUES, ROW_VALUE_CODES) if by_row else (encode_bitmap, VALUES, VALUE_CODES)
        )
        if part.value_bits is None:
            return encode(rows, keep, dtype)
        codes = {p: to_codes(own * keep[p], part.value_bits, part.group_size) for p, own in rows.items()}
        for (p, suffix), tensor in encode({p: own for p, (own, _) in codes.items()}, keep, torch.uint8).items():
            if suffix == plain:
                stored[p, in_codes] = pack_codes(tensor, part.value_bits)
            else:
                stored[p, suffix] = tensor
        stored |= {(p, VALUE_SCALES): scales for p, (_, scales) in codes.items()}
    return stored


def keep_largest_of_rows(rows: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest entries of each row."""
    keep = torch.zeros(rows.shape, dtype=torch.bool)
    return keep.scatter_(1, rows.abs().topk(count, 1).indices, True)


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
    shared: dict[tuple[Projection, str], Tensor] = {}
    for part in spec.center:
        for p in part.projections:
            mean = torch.stack([rows[p].float() for rows in experts]).mean(0)
            if part.method == "dense":
                shared[p, CENTER] = mean.to(dtype)
            elif part.method == "trellis":
                symbols, scales = to_symbols(mean, part.bits, part.group_size)
                shared |= {(p, CENTER_TRELLIS): pack_codes(symbols, part.bits), (p, CENTER_TRELLIS_SCALES): scales}
            else:
                shared |= coded((p, CENTER_CODES), (p, CENTER_SCALES), mean, part.bits, part.group_size)
    hidden_size = experts[0][DOWN].shape[1]
    center = restore_center(spec, shared, hidden_size)
    stored = []
    for expert, rows in enumerate(experts):
        left = {p: own.float() - center.get(p, 0) for p, own in rows.items()}
        tensors: dict[tuple[Projection, str], Tensor] = {}
        for part in spec.of_expert(expert).residual:
            made = encode_part(part, {p: left[p] for p in part.projections}, dtype)
            for p, decoded in part.decode(made, hidden_size).items():
                left[p] = left[p] - decoded
            tensors |= made
        stored.append(tensors)
    return shared, stored


def write_checkpoint(folder: Path, config: PreTrainedConfig, tensors: dict[str, Tensor], block: dict | None) -> None:
    """config.json (with ``quantization_config`` if given) and one model.safetensors."""
    folder.mkdir(parents=True)
    fields = config.to_dict() | ({"quantization_config": block} if block else {})
    (folder / "config.json").write_text(json.dumps(fields, indent=1))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def compress_experts(
    fmt: ResMoEFormat, tensors: dict[str, Tensor]
) -> dict[int, tuple[dict[tuple[Projection, str], Tensor], list[dict[tuple[Projection, str], Tensor]]]]:
    """Put a checkpoint's dense experts, one by one on disk, in codes as the block says.

    Args:
        fmt: the block.
        tensors: all of the checkpoint by name; the experts' are replaced.
    Returns:
        by layer what ``compress_layer`` gives.
    """
    made = {}
    for index, spec in fmt.layers.items():
        experts = []
        for expert in range(fmt.num_experts):
            stem = fmt.names.expert_stem(index, expert)
            dense = {p: tensors.pop(f"{stem}.{disk}.weight") for p, disk in fmt.names.projections.items()}
            experts.append(dense | {DOWN: dense[DOWN].T})
        shared, stored = made[index] = compress_layer(experts, spec, DTYPES[fmt.dtype])
        tensors |= {tensor_name(fmt, index, None, *key): tensor for key, tensor in shared.items()}
        for expert, own in enumerate(stored):
            tensors |= {tensor_name(fmt, index, expert, *key): tensor for key, tensor in own.items()}
    return made


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
        format_version=version_for(layers.values(), {}),
        written_by="tests",
        dtype=dtype,
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        names=names,
        layers=layers,
    )
    compressed, twin = dict(tensors), dict(tensors)
    for index, (shared, stored) in compress_experts(fmt, compressed).items():
        for expert in range(EXPERTS):
            restored = restore_expert(layers[index].of_expert(expert), shared, stored[expert], HIDDEN)
            for projection, disk in names.projections.items():
                rows = restored[projection].T if projection == DOWN else restored[projection]
                twin[f"{names.expert_stem(index, expert)}.{disk}.weight"] = rows.to(DTYPES[dtype])
    write_checkpoint(root / "resmoe", model.config, compressed, fmt.model_dump(mode="json"))
    write_checkpoint(root / "twin", model.config, twin, None)
    return root / "resmoe", root / "twin"
