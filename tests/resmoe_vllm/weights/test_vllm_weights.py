"""Loading: resident bytes, every tensor checked and counted, dummy weights."""

import re
from math import prod

import pytest
import torch

from compress_tools.errors import FormatError
from compress_tools.format.parts.bitmap import MASK, VALUES
from compress_tools.format.parts.dense import CENTER
from compress_tools.format.parts.low_rank import U, V
from compress_tools.format.parts.quantized import CODES
from compress_tools.format.tensors import group_map_bytes, layer_bytes, row_pointer_bytes
from resmoe_vllm.kernels.reference import restore_ref
from tests.resmoe_vllm.layers import (
    StoredLayer,
    bind_layer,
    bound_weights,
    grouped_layer,
    hand_over,
    layer_kinds,
    load_all,
    new_loader,
    store_layer,
)
from tests.resmoe_vllm.twins import DOWN, GATE, UP

SIZE_E, SIZE_I, SIZE_H = 4, 33, 67
KINDS = layer_kinds(SIZE_I, SIZE_H)
WITH_GROUPS = KINDS | {"groups": grouped_layer(SIZE_I, SIZE_H)}


def stored(kind: str, dtype: str = "float32") -> StoredLayer:
    """One layer of E4, I33, H67."""
    return store_layer(WITH_GROUPS[kind], SIZE_E, SIZE_I, SIZE_H, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", WITH_GROUPS)
def test_resident_bytes_are_the_formats(kind: str, dtype: str) -> None:
    layer = stored(kind, dtype)
    module, loader = new_loader(layer)
    load_all(module, loader, layer)
    resident = sum(tensor.untyped_storage().nbytes() for tensor in (*module.parameters(), *module.buffers()))
    memory_only = row_pointer_bytes(layer.fmt, 0) + group_map_bytes(layer.fmt, 0)
    assert resident == layer_bytes(layer.fmt, 0) + memory_only


def test_the_models_dtype_leaves_codes_and_scales_as_they_are() -> None:
    """fp16 has no room for the scales of tiny residuals, fp32 would double them."""
    layer = stored("low_rank+bitmap+quantized", "bfloat16")
    module, _ = new_loader(layer, dtype=torch.float16)
    kinds = {name.split("_resmoe_")[1]: param.dtype for name, param in module.named_parameters()}
    assert kinds["center"] == torch.float16
    assert {kind for suffix, kind in kinds.items() if suffix.endswith("scales")} == {torch.bfloat16}
    assert {kind for suffix, kind in kinds.items() if suffix.endswith("codes")} == {torch.uint8}


def test_expert_ranks_hold_their_groups_only() -> None:
    layer = stored("groups")
    module, loader = new_loader(layer, local_experts=[0, 1])
    load_all(module, loader, layer)
    rows = {group.experts: len(group.rows) for group in loader.groups}
    assert rows == {(3, 0): 1, (2,): 0, (1,): 1}
    maps = [group.expert_map.tolist() for group in loader.bind(module) if group.expert_map is not None]
    assert maps == [[0, -1, -1, -1], [-1, 0, -1, -1]]


def test_a_missing_tensor_of_a_group_is_named() -> None:
    layer = stored("groups")
    del layer.experts[1][GATE, CODES]
    module, loader = new_loader(layer)
    with pytest.raises(
        FormatError, match=r"layer 0: 1 of \d+ tensors are missing, first .*experts\.1\.gate_proj.*codes"
    ):
        load_all(module, loader, layer)


def test_a_tensor_of_another_group_is_refused() -> None:
    layer = stored("groups")
    module, _ = new_loader(layer)
    with pytest.raises(FormatError, match=r"experts\.2\.gate_proj\.resmoe_codes: quantization_config has no such"):
        hand_over(module, (GATE, CODES), 2, layer.experts[0][GATE, CODES])


@pytest.mark.parametrize("more", [True, False], ids=["one_more", "one_less"])
def test_rows_of_unequal_counts_are_refused(more: bool) -> None:
    layer = stored("bitmap_rows")
    byte = int(layer.experts[3][DOWN, MASK][5, 0])
    free = ~byte & 255
    assert byte
    assert free
    layer.experts[3][DOWN, MASK][5, 0] = byte | (free & -free) if more else byte & (byte - 1)
    module, loader = new_loader(layer)
    kept = 23 if more else 21
    message = rf"experts\.3\.down_proj\.resmoe_mask: a row keeps {kept} values, expected 22"
    with pytest.raises(FormatError, match=message):
        load_all(module, loader, layer)


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_ranks_share_the_values(kind: str) -> None:
    """Ranks hold every kept value once; only the packed values' starts come on top."""
    layer = stored(kind)
    values, starts = 0, 0
    for rank in range(3):
        module, loader = new_loader(layer, tp_size=3, tp_rank=rank)
        load_all(module, loader, layer)
        assert (loader.groups[0].staged_values, loader.groups[0].row_counts) == ({}, {})
        values += sum(p.numel() for name, p in module.named_parameters() if name.endswith(f"_{VALUES}"))
        starts += sum(p.numel() for name, p in module.named_parameters() if name.endswith("starts"))
    bitmaps = [part for part in layer.spec.residual if part.method == "bitmap"]
    assert values == SIZE_E * sum(part.values_per_expert for part in bitmaps if part.value_bits is None)
    assert starts == 3 * SIZE_E * len(bitmaps)


@pytest.mark.parametrize("kind", ["bitmap_rows-8_and_4bit", "quantized-3bit", "low_rank+quantized", "low_rank-8bit"])
def test_tensor_ranks_hold_slices_of_rows(kind: str) -> None:
    """Everything whose first dimension is I is cut; V is on every rank."""
    layer = stored(kind)
    whole, loader = new_loader(layer)
    load_all(whole, loader, layer)
    whole_weights = bound_weights(whole, loader)
    for rank in range(3):
        module, loader = new_loader(layer, tp_size=3, tp_rank=rank)
        load_all(module, loader, layer)
        weights = bound_weights(module, loader)
        for projection in (GATE, UP, DOWN):
            for expert in range(SIZE_E):
                rows = restore_ref(whole_weights, projection, expert)[11 * rank : 11 * (rank + 1)]
                assert torch.equal(restore_ref(weights, projection, expert), rows)


@pytest.mark.parametrize("missing", [("low_rank-joint", GATE, U), ("bitmap-joint", UP, MASK), ("both", UP, VALUES)])
@pytest.mark.parametrize("tp_size", [1, 3])
def test_a_missing_tensor_is_named(missing: tuple, tp_size: int) -> None:
    kind, projection, suffix = missing
    layer = stored(kind)
    del layer.experts[2][projection, suffix]
    module, loader = new_loader(layer, tp_size=tp_size)
    name = f"model.layers.0.mlp.experts.2.{projection}.{suffix}"
    with pytest.raises(FormatError, match=rf"layer 0: 1 of \d+ tensors are missing, first {re.escape(name)};"):
        load_all(module, loader, layer)


def test_a_missing_center_is_named() -> None:
    layer = stored("low_rank-joint")
    del layer.shared[DOWN, CENTER]
    module, loader = new_loader(layer, local_experts=[2, 3])
    with pytest.raises(FormatError, match=r"1 of .* first model\.layers\.0\.mlp\.experts\.0\.down_proj\.resmoe_center"):
        load_all(module, loader, layer)


@pytest.mark.parametrize(
    "kind, projection, suffix, change, message",
    [
        (
            "low_rank-joint",
            GATE,
            U,
            lambda t: t[:, 1:],
            r"gate_proj\.resmoe_u: expected \[33, 11\] float32, found \[33, 10\]",
        ),
        (
            "low_rank-joint",
            DOWN,
            V,
            lambda t: t.T,
            r"down_proj\.resmoe_v: expected \[11, 67\] float32, found \[67, 11\]",
        ),
        (
            "low_rank-joint",
            UP,
            V,
            lambda t: t.half(),
            r"up_proj\.resmoe_v: expected .* float32, found \[11, 67\] float16",
        ),
        (
            "bitmap-joint",
            UP,
            MASK,
            lambda t: t[1:],
            r"up_proj\.resmoe_mask: expected \[33, 16\] uint8, found \[32, 16\]",
        ),
        (
            "bitmap-joint",
            GATE,
            VALUES,
            lambda t: t[1:],
            r"gate_proj\.resmoe_values: expected \[2211\] .* found \[2210\]",
        ),
        (
            "bitmap-joint",
            UP,
            MASK,
            lambda t: t & 0xFE,
            r"gate_proj\.resmoe_values: masks keep \d+ values, 2211 are stored",
        ),
        (
            "bitmap-joint",
            UP,
            MASK,
            lambda t: t | 0x80,
            r"up_proj\.resmoe_mask: padding bits after column 66 are set",
        ),
    ],
    ids=["rank", "transposed", "dtype", "mask_rows", "values", "popcount", "padding"],
)
@pytest.mark.parametrize("tp_size", [1, 3])
def test_a_wrong_tensor_is_refused(kind: str, projection, suffix, change, message: str, tp_size: int) -> None:
    layer = stored(kind)
    layer.experts[1][projection, suffix] = change(layer.experts[1][projection, suffix])
    module, loader = new_loader(layer, tp_size=tp_size)
    with pytest.raises(FormatError, match=r"^model\.layers\.0\.mlp\.experts\.1\." + message):
        load_all(module, loader, layer)


def test_a_tensor_stored_twice_is_refused() -> None:
    layer = stored("low_rank-joint")
    module, _ = new_loader(layer)
    u = layer.experts[0][GATE, U]
    assert hand_over(module, (GATE, U), 3, u)
    with pytest.raises(FormatError, match=r"experts\.3\.gate_proj\.resmoe_u: stored twice"):
        hand_over(module, (GATE, U), 3, u)


@pytest.mark.parametrize(
    "key, expert, name",
    [((UP, U), 1, "experts.1.up_proj.resmoe_u"), ((GATE, CENTER), 1, "experts.1.gate_proj.resmoe_center")],
    ids=["not_the_first_of_its_group", "center_of_another_expert"],
)
def test_a_tensor_that_the_config_does_not_know_is_refused(key: tuple, expert: int, name: str) -> None:
    layer = stored("low_rank-joint")
    module, _ = new_loader(layer)
    with pytest.raises(FormatError, match=re.escape(name) + ": quantization_config has no such tensor in layer 0"):
        hand_over(module, key, expert, torch.zeros(1))


def test_a_loader_without_shard_ids_is_refused() -> None:
    module, _ = new_loader(stored("low_rank-joint"))
    param = module.w13_resmoe_u
    with pytest.raises(FormatError, match="doesn't say which expert tensor"):
        param.weight_loader(param, torch.zeros(1))


def test_tensors_of_other_ranks_are_left_alone() -> None:
    layer = stored("low_rank-joint")
    module, loader = new_loader(layer, local_experts=[1])
    assert hand_over(module, (GATE, U), 0, layer.experts[0][GATE, U]) is False
    assert hand_over(module, (GATE, CENTER), 0, layer.shared[GATE, CENTER]) is True
    assert loader.groups[0].loaded == {(GATE, CENTER, 0)}


@pytest.mark.parametrize("tp_size", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_dummy_weights_are_whole(kind: str, tp_size: int) -> None:
    layer = stored(kind)
    module, loader = new_loader(layer, tp_size=tp_size, tp_rank=tp_size - 1)
    loader.load_dummies()
    loader.check_complete()
    weights, ids = torch.ones(2, 1), torch.tensor([[0], [3]])
    out = bind_layer(module, loader)(torch.ones(2, SIZE_H), weights, ids)
    assert out.isfinite().all()
    assert out.abs().max() > 0


def test_params_have_vllm_names_and_one_row_per_expert() -> None:
    module, _ = new_loader(stored("low_rank-joint"))
    shapes = {name: tuple(param.shape) for name, param in module.named_parameters()}
    rank = KINDS["low_rank-joint"].residual[0].rank
    assert shapes == {
        "w13_resmoe_center": (1, prod((2, SIZE_I, SIZE_H))),
        "w2_resmoe_center": (1, SIZE_I * SIZE_H),
        "w13_resmoe_u": (SIZE_E, SIZE_I * rank),
        "w13_resmoe_v": (SIZE_E, 2 * rank * SIZE_H),
        "w2_resmoe_v": (SIZE_E, rank * SIZE_H),
    }
