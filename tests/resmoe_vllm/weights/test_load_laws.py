"""Loading by law: what lies in the parameters is what the format means, in any order, on any rank, from any buffer."""

import re

import pytest
import torch

from compress_tools.errors import FormatError
from compress_tools.format.parts.bitmap import MASK, VALUES
from compress_tools.format.parts.dense import CENTER
from compress_tools.format.parts.low_rank import U, V
from compress_tools.format.parts.quantized import CODES
from compress_tools.format.tensors import CENTER_EXPERT, tensor_name
from resmoe_vllm.kernels.reference import restore_ref
from resmoe_vllm.weights.layout import PARAM_PREFIX, PROJECTION_OF_SHARD, make_layout
from tests.resmoe_vllm.layers import (
    StoredLayer,
    bound_weights,
    grouped_layer,
    hand_over,
    layer_kinds,
    load_all,
    new_loader,
    store_layer,
)
from tests.resmoe_vllm.twins import DOWN, GATE, PROJECTIONS, UP

SIZE_E, SIZE_I, SIZE_H = 4, 33, 67
KINDS = layer_kinds(SIZE_I, SIZE_H)
WITH_GROUPS = KINDS | {"groups": grouped_layer(SIZE_I, SIZE_H)}


def stored(kind: str) -> StoredLayer:
    """One layer of E4, I33, H67."""
    return store_layer(WITH_GROUPS[kind], SIZE_E, SIZE_I, SIZE_H, "float32")


def check_restored(module, loader, layer: StoredLayer, experts: list[int], rank: int = 0, ranks: int = 1) -> int:
    """Every expert's rows of this rank are the format's own; returns how many matrices were compared."""
    size, compared = SIZE_I // ranks, 0
    bound = iter(loader.bind(module))
    for group in loader.groups:
        if not group.rows:
            continue
        weights = next(bound).weights
        for expert, row in group.rows.items():
            assert expert in experts
            whole = layer.restored(expert)
            for projection in PROJECTIONS:
                rows = whole[projection][rank * size : (rank + 1) * size]
                torch.testing.assert_close(restore_ref(weights, projection, row), rows, rtol=0, atol=1e-6)
                compared += 1
    return compared


@pytest.mark.parametrize("kind", WITH_GROUPS)
def test_parameters_mean_what_the_format_means_in_either_order(kind: str) -> None:
    layer = stored(kind)
    for reverse in (False, True):
        module, loader = new_loader(layer)
        load_all(module, loader, layer, reverse=reverse)
        assert check_restored(module, loader, layer, list(range(SIZE_E))) == SIZE_E * 3


@pytest.mark.parametrize("kind", WITH_GROUPS)
def test_ranks_together_mean_what_the_format_means(kind: str) -> None:
    """Three tensor ranks; two expert ranks, whose experts are in an order of their own."""
    layer = stored(kind)
    for rank in range(3):
        module, loader = new_loader(layer, tp_size=3, tp_rank=rank)
        load_all(module, loader, layer)
        assert check_restored(module, loader, layer, list(range(SIZE_E)), rank, 3) == SIZE_E * 3
    for own in ([3, 1], [0, 2]):
        module, loader = new_loader(layer, local_experts=own)
        load_all(module, loader, layer)
        assert check_restored(module, loader, layer, own) == 2 * 3


@pytest.mark.parametrize("tp_size", [1, 3])
@pytest.mark.parametrize("kind", ["bitmap-gate_up+down", "bitmap-4bit", "low_rank+bitmap+quantized", "bitmap_rows"])
def test_a_loaders_buffer_may_be_reused(kind: str, tp_size: int) -> None:
    """Each tensor is handed over in a buffer that is overwritten at once, as streaming loaders do."""
    layer = stored(kind)
    module, loader = new_loader(layer, tp_size=tp_size)
    jobs = [(key, CENTER_EXPERT, tensor) for key, tensor in layer.shared.items()]
    jobs += [(key, e, tensor) for e, own in enumerate(layer.experts) for key, tensor in own.items()]
    for key, expert, tensor in jobs:
        buffer = tensor.clone()
        assert hand_over(module, key, expert, buffer)
        buffer.view(torch.uint8).fill_(0x55)
    loader.check_complete()
    assert check_restored(module, loader, layer, list(range(SIZE_E)), 0, tp_size) == SIZE_E * 3


@pytest.mark.parametrize("tp_size", [1, 3])
@pytest.mark.parametrize("change", ["a bit more", "a bit less"])
@pytest.mark.parametrize("kind", ["bitmap-gate_up+down", "bitmap-4bit", "bitmap_rows"])
def test_masks_of_other_counts_are_refused_either_way(kind: str, change: str, tp_size: int) -> None:
    layer = stored(kind)
    mask = layer.experts[2][UP, MASK]
    row, byte = 7, 3
    old = int(mask[row, byte])
    bits = [bit for bit in range(8) if bool(old >> bit & 1) == (change == "a bit less")]
    assert bits
    mask[row, byte] = old ^ 1 << bits[0]
    module, loader = new_loader(layer, tp_size=tp_size)
    with pytest.raises(
        FormatError, match=r"experts\.2\..*keeps? \d+ values, (\d+ are stored|expected \d+ in every row)"
    ):
        load_all(module, loader, layer)


@pytest.mark.parametrize("column", range(SIZE_H, 128), ids=lambda c: f"c{c}")
def test_every_padding_bit_is_checked(column: int) -> None:
    layer = stored("bitmap_rows")
    layer.experts[0][GATE, MASK][SIZE_I - 1, column // 8] |= 1 << column % 8
    module, _ = new_loader(layer)
    with pytest.raises(FormatError, match=f"padding bits after column {SIZE_H - 1} are set"):
        hand_over(module, (GATE, MASK), 0, layer.experts[0][GATE, MASK])


@pytest.mark.parametrize("size_h", [8, 64, 72], ids=lambda h: f"H{h}")
def test_masks_without_a_broken_byte_are_taken_to_the_last_column(size_h: int) -> None:
    layer = store_layer(layer_kinds(6, size_h)["bitmap-joint"], 2, 6, size_h, "float32")
    module, loader = new_loader(layer)
    load_all(module, loader, layer)
    weights = bound_weights(module, loader)
    for projection in PROJECTIONS:
        expected = layer.restored(1)[projection]
        torch.testing.assert_close(restore_ref(weights, projection, 1), expected, rtol=0, atol=1e-6)


def test_packed_values_lie_behind_each_other() -> None:
    """Starts of a rank are the running sum of its experts' counts, group after group, and end with the values."""
    layer = stored("bitmap-gate_up+down")
    for rank in range(3):
        module, loader = new_loader(layer, tp_size=3, tp_rank=rank)
        load_all(module, loader, layer)
        first, second = bound_weights(module, loader).residual
        assert first.values.numel() + second.values.numel() == sum(
            param.numel() for name, param in module.named_parameters() if name.endswith(VALUES)
        )
        for part in (first, second):
            counts = [
                sum(
                    int(torch.tensor([b.bit_count() for b in part.mask[p][e].flatten().tolist()]).sum())
                    for p in part.mask
                )
                for e in range(SIZE_E)
            ]
            begin = int(part.starts[0])
            assert part.starts.tolist() == [begin + sum(counts[:e]) for e in range(SIZE_E)]


def test_the_shared_center_is_stored_once_and_under_expert_0_only() -> None:
    layer = stored("low_rank-joint")
    module, _ = new_loader(layer)
    center = layer.shared[GATE, CENTER]
    with pytest.raises(FormatError, match=r"experts\.3\.gate_proj\.resmoe_center: quantization_config has no such"):
        hand_over(module, (GATE, CENTER), 3, center)
    assert hand_over(module, (GATE, CENTER), 0, center)
    with pytest.raises(FormatError, match=r"experts\.0\.gate_proj\.resmoe_center: stored twice"):
        hand_over(module, (GATE, CENTER), 0, center)


def test_all_missing_tensors_are_counted() -> None:
    layer = stored("groups")
    _, loader = new_loader(layer, local_experts=[0, 2])
    (total,) = {sum(group.num_places for group in loader.groups)}
    shared = len(layer.shared)
    assert total == shared + len(layer.experts[0]) + len(layer.experts[2])
    missing = [name for group in loader.groups for name in group.missing()]
    assert len(missing) == len(set(missing)) == total
    with pytest.raises(FormatError, match=rf"layer 0: {total} of {total} tensors are missing, first "):
        loader.check_complete()


def test_a_loader_that_is_not_asked_says_nothing() -> None:
    layer = stored("low_rank-joint")
    module, _ = new_loader(layer, local_experts=[1])
    param = module.w13_resmoe_u
    for expert in (0, 1):
        tensor = layer.experts[expert][GATE, U]
        assert param.weight_loader(param, tensor, "", shard_id="w1", expert_id=expert) is None


def test_shards_are_the_projections_that_vllm_means() -> None:
    """w1 is the gate, w3 up, w2 down; gate and up share a parameter."""
    assert PROJECTION_OF_SHARD == {"w1": GATE, "w3": UP, "w2": DOWN}
    assert PARAM_PREFIX == {GATE: "w13", UP: "w13", DOWN: "w2"}


@pytest.mark.parametrize(
    ("kind", "expert", "projection", "suffix", "name"),
    [
        ("quantized-4bit-no_center", 3, DOWN, CODES, "model.layers.0.mlp.experts.3.down_proj.resmoe_codes"),
        ("low_rank-each", 0, UP, V, "model.layers.0.mlp.experts.0.up_proj.resmoe_v"),
    ],
)
@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_dtype_and_shape_are_each_checked(kind, expert, projection, suffix, name, change: str) -> None:
    layer = stored(kind)
    tensor = layer.experts[expert][projection, suffix]
    assert tensor_name(layer.fmt, 0, expert, projection, suffix) == name
    module, _ = new_loader(layer)
    wrong = tensor.to(torch.int16) if change == "dtype" else torch.cat([tensor, tensor[:1]])
    with pytest.raises(FormatError, match=re.escape(name) + ": expected "):
        hand_over(module, (projection, suffix), expert, wrong)


@pytest.mark.parametrize("kind", WITH_GROUPS)
@pytest.mark.parametrize("tp_size", [1, 3])
def test_slots_fill_their_parameters_without_gap_or_overlap(kind: str, tp_size: int) -> None:
    layer = stored(kind)
    for group in layer.spec.expert_groups(SIZE_E):
        layout = make_layout(layer.fmt, layer.spec.of_group(group), tp_size)
        assert layout.packed == (tp_size > 1)
        assert layout.intermediate_size == SIZE_I // tp_size
        for name, (columns, dtype, shared) in layout.params.items():
            own = [slot for slot in layout.slots.values() if slot.param == name]
            taken = [c for slot in own for c in range(slot.start, slot.start + torch.Size(slot.shape).numel())]
            assert taken == list(range(columns))
            assert {(slot.dtype, slot.shared) for slot in own} == {(dtype, shared)}


@pytest.mark.parametrize("kind", WITH_GROUPS)
def test_dummy_values_are_small_finite_and_of_both_signs(kind: str) -> None:
    layer = stored(kind)
    module, loader = new_loader(layer)
    loader.load_dummies()
    loader.check_complete()
    seen = 0
    for name, param in module.named_parameters():
        if not param.is_floating_point():
            continue
        values = param.detach().float()
        assert values.abs().max() <= 1e-3
        assert values.std() > 1e-4
        seen += 1
        if "scales" in name:
            assert values.min() >= 0
        elif values.numel() > 20:
            assert values.min() < -2e-4
            assert values.max() > 2e-4
    assert seen
