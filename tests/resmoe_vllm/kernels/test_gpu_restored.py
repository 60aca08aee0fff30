"""Many tokens: weights restored to a scratch first, some experts at a time, against the layer's reference.

New memory is full of NaN, and so is the scratch before each test: what is read was written for this layer.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from compress_tools.errors import KernelUnsupportedError
from resmoe_vllm.kernels.activation import SILU
from resmoe_vllm.kernels.gpu import block_sizes, launches, scratch
from resmoe_vllm.kernels.gpu import layer as gpu_layer
from resmoe_vllm.kernels.gpu.block_sizes import Blocks, Config, Strategy, TokenClass, default_config, token_classes
from resmoe_vllm.kernels.gpu.layer import GpuKernel
from tests.resmoe_vllm.kernels.gpu_check import check
from tests.resmoe_vllm.kernels.test_gpu_launches import SIZE_H, SIZE_I, groups_of
from tests.resmoe_vllm.kernels.test_vllm_kernels import KINDS, hidden_states, make_routing
from tests.resmoe_vllm.layers import grouped_layer, layer_kinds

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
SMALL = Blocks(n=32, k=32, warps=4, stages=2)
RESTORED = Config(
    16, SMALL, SMALL, SMALL, replace(SMALL, n=64), Strategy.RESTORED, programs=24, restore=replace(SMALL, n=16)
)
# one of each way to decode, sums of them, and one with nothing to decode
SOME_KINDS = ("bitmap-joint", "both", "quantized-3bit", "trellis-3bit-no_center", "low_rank-joint")
# a matrix of an expert in fp32, as the scratch has it
MATRIX = 4 * SIZE_I * SIZE_H


@pytest.fixture(autouse=True)
def _nan_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(scratch, "_scratch", {})
    monkeypatch.setattr(gpu_layer, "token_classes", lambda *shape: (TokenClass(13, RESTORED),))
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def _two_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up of one expert at a time, and down of two."""
    monkeypatch.setattr(scratch, "scratch_limit", lambda: 2 * MATRIX + 1024)


@pytest.fixture
def restores(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, int]]:
    """Key and first expert of each launch that restores."""
    seen: list[tuple[object, int]] = []
    plain = launches.LayerLaunches.launch

    def launch(self, key: tuple, kernel: object, grid: object, *arguments: object, **options: int) -> None:
        if key[0] == "restore":
            seen.append((key[1:], arguments[1]))
        plain(self, key, kernel, grid, *arguments, **options)

    monkeypatch.setattr(launches.LayerLaunches, "launch", launch)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_every_coder(kind: str) -> None:
    weights, ids = make_routing(4, "T7-K2-padded")
    check(groups_of(layer_kinds(SIZE_I, SIZE_H)[kind], "bfloat16"), hidden_states(7, SIZE_H, "bfloat16"), weights, ids)


@pytest.mark.parametrize(
    "kind, routing",
    [
        *((kind, "T7-K2-padded") for kind in SOME_KINDS),
        *(("quantized-3bit", routing) for routing in ("T7-K1-padded", "T3-K2-all_padded", "T1-KE", "T101-K2")),
    ],
)
@pytest.mark.usefixtures("_two_matrices")
def test_some_experts_at_a_time(kind: str, routing: str, restores: list[tuple[object, int]]) -> None:
    weights, ids = make_routing(4, routing)
    x = hidden_states(len(ids), SIZE_H, "float32")
    check(groups_of(layer_kinds(SIZE_I, SIZE_H)[kind]), x, weights, ids)
    wanted = [(("sides", side, 0), first) for first in range(4) for side in (0, 1)]
    wanted += [(("down", 0, 0), first) for first in (0, 2)]
    assert restores == ([] if kind == "low_rank-joint" else wanted)


@pytest.mark.parametrize("kind", SOME_KINDS)
@pytest.mark.usefixtures("_two_matrices")
def test_experts_of_other_ranks(kind: str) -> None:
    weights, ids = make_routing(4, "T7-K2-padded")
    expert_map = torch.tensor([1, -1, -1, 0], dtype=torch.int32)
    groups = groups_of(layer_kinds(SIZE_I, SIZE_H)[kind], local_experts=[3, 0])
    check(groups, hidden_states(7, SIZE_H, "float32"), weights, ids, expert_map)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("routing", ["T7-K2-padded", "T1-KE"])
def test_groups_of_experts(
    routing: str, limited: bool, monkeypatch: pytest.MonkeyPatch, restores: list[tuple[object, int]]
) -> None:
    if limited:
        monkeypatch.setattr(scratch, "scratch_limit", lambda: 0)
    weights, ids = make_routing(4, routing)
    check(groups_of(grouped_layer(SIZE_I, SIZE_H)), hidden_states(len(ids), SIZE_H, "float32"), weights, ids)
    assert {key[2] for key, _ in restores} != {0}


def test_experts_without_pairs_are_not_restored() -> None:
    """Of four experts one has pairs: the others' part of the scratch keeps what it had."""
    (group,) = groups_of(layer_kinds(SIZE_I, SIZE_H)["quantized-3bit"])
    kernel = GpuKernel([group], SILU)
    ids = torch.full((5, 1), 2, dtype=torch.int32)
    kernel(hidden_states(5, SIZE_H, "float32"), torch.ones(5, 1), ids)
    _, (only,) = kernel._launches(1, torch.empty(0), None)
    for restored in (*only.restored_sides, *only.restored_down):
        for weight in restored.plain:
            assert weight is not None
            written = ~weight[0].own.isnan().flatten(1).any(1)
            assert written.tolist() == [False, False, True, False]


def test_layers_share_one_scratch_that_is_as_large_as_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "scratch_limit", lambda: 5 * MATRIX + 4096)
    weights, ids = make_routing(4, "T1-KE")
    addresses = set()
    for kind in ("quantized-3bit", "bitmap-joint"):
        groups = groups_of(layer_kinds(SIZE_I, SIZE_H)[kind])
        check(groups, hidden_states(1, SIZE_H, "float32"), weights, ids)
        (memory,) = scratch._scratch.values()
        addresses.add(memory.data_ptr())
    assert len(addresses) == 1
    assert 4 * MATRIX <= memory.numel() <= 5 * MATRIX + 4096


CODED = frozenset({"quantized"})


def test_restored_from_many_rows_of_an_expert_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def strategies() -> dict[int, Strategy]:
        classes = token_classes(8, 64, 2048, 1024, "no card", torch.bfloat16, CODED)
        return {one.tokens: one.config.strategy for one in classes}

    first, tile, restored = Strategy
    few = dict.fromkeys((1, 4, 16, 64), first)
    assert strategies() == {**few, 192: tile, 512: tile, 8192: restored}
    monkeypatch.setenv(block_sizes.ROWS_VARIABLE, "300")
    assert strategies() == {**few, 192: tile, 768: tile, 2400: tile, 8192: restored}
    monkeypatch.setenv(block_sizes.ROWS_VARIABLE, "0")
    assert strategies() == {**few, 192: restored, 768: restored, 8192: restored}
    monkeypatch.setenv(scratch.SCRATCH_VARIABLE, "0")
    assert strategies() == {**few, 192: tile, 768: tile, 8192: tile}


def test_nothing_is_restored_where_nothing_is_decoded_or_in_fp32() -> None:
    for coders in ({"low_rank"}, {"dense"}):
        assert default_config(4096, 8, 64, frozenset(coders)).strategy == Strategy.CENTER_IN_TILE
    assert default_config(4096, 8, 64, CODED, torch.float32).strategy == Strategy.CENTER_IN_TILE
    assert default_config(4096, 8, 64, CODED).strategy == Strategy.RESTORED


@pytest.mark.parametrize("name", [block_sizes.ROWS_VARIABLE, scratch.SCRATCH_VARIABLE])
def test_a_setting_that_is_no_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "many")
    with pytest.raises(KernelUnsupportedError, match=f"{name} is 'many'; give a whole number"):
        default_config(4096, 8, 64, CODED)


@pytest.mark.parametrize("limit, sides, down", [(0, 1, 1), (2, 1, 2), (5, 2, 4), (7, 3, 5), (16, 8, 8), (10**6, 8, 8)])
def test_experts_fall_into_equal_chunks(limit: int, sides: int, down: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight experts, in units of a matrix: as few chunks as the limit allows, and never more than it."""
    monkeypatch.setattr(scratch, "scratch_limit", lambda: limit * 512)
    found = [scratch.chunk_experts(weights, 8, 256, 2) for weights in (2, 1)]
    assert [-(-8 // chunk) for chunk in found] == [-(-8 // chunk) for chunk in (sides, down)]
    for weights, chunk in zip((2, 1), found, strict=True):
        assert weights * chunk * 512 <= max(limit, weights) * 512
        assert weights * chunk * 512 <= scratch.scratch_bytes(2, 8, 256, 2)
