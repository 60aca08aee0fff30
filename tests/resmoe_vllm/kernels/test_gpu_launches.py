"""What a GPU layer launches, without a GPU: no kernel that was not warmed up, one center for all groups of experts."""

import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FrameType

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from resmoe_vllm.kernels.activation import SILU
from resmoe_vllm.kernels.gpu import launches
from resmoe_vllm.kernels.gpu.block_sizes import ROWS_VARIABLE, Config, default_config, token_classes
from resmoe_vllm.kernels.gpu.layer import GpuKernel
from tests.resmoe_vllm.kernels.gpu_check import check
from tests.resmoe_vllm.kernels.test_vllm_kernels import hidden_states, make_routing
from tests.resmoe_vllm.layers import grouped_layer, layer_kinds, load_all, new_loader, store_layer
from tests.resmoe_vllm.twins import DOWN, GATE, UP, layer_spec, quantized

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
SIZE_I, SIZE_H = 33, 67
LOW_RANK = frozenset({"low_rank"})
CODERS = (LOW_RANK, *(frozenset({coder}) for coder in ("bitmap", "quantized", "trellis", "dense")))
# of seven launches, which take 41 us of the host; Triton's take as much again
MOST_FRAMES = 100
LAUNCHES = ("first", "hidden", "shrink", "last")
# Counts that kernels are not compiled anew for.
UNSPECIALIZED = ("num_", "pair_blocks", "m_blocks", "first_", "end_", "splits_", "slab_")


@pytest.fixture(autouse=True)
def _nan_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def groups_of(spec, dtype: str = "float32", size_i: int = SIZE_I, size_h: int = SIZE_H, **ranks: object) -> tuple:
    """The loaded groups of a layer of four experts, as on a GPU: rows padded, slots aligned."""
    layer = store_layer(spec, 4, size_i, size_h, dtype)
    module, loader = new_loader(layer, padded=True, **ranks)
    load_all(module, loader, layer)
    return loader.bind(module)


@pytest.mark.parametrize("routing", ["T7-K2-padded", "T1-KE", "T101-K2"])
def test_groups_of_experts(routing: str) -> None:
    weights, ids = make_routing(4, routing)
    check(groups_of(grouped_layer(SIZE_I, SIZE_H)), hidden_states(len(ids), SIZE_H, "float32"), weights, ids)


def test_groups_share_one_center(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products are launched once, and so are the sums over tokens."""
    seen: list[object] = []
    plain = launches.LayerLaunches.launch

    def launch(self, key: object, kernel: object, *arguments: object, **options: int) -> None:
        seen.append(key)
        plain(self, key, kernel, *arguments, **options)

    monkeypatch.setattr(launches.LayerLaunches, "launch", launch)
    weights, ids = make_routing(4, "T7-K2-padded")
    kernel = GpuKernel(groups_of(grouped_layer(SIZE_I, SIZE_H)), SILU)
    kernel(hidden_states(7, SIZE_H, "float32"), weights, ids)
    names = [key[0] for key in seen]
    assert {name: names.count(name) for name in names} == {
        "align": 3, "first": 2, "hidden": 3, "shrink": 2, "mix": 1, "last": 3, "combine": 1
    }  # fmt: skip
    called = next(one for one in kernel._launches(2, torch.empty(0), None)[1] if one.top_k)
    routed = [job.spec.routed for products in called.last for job in products.jobs]
    assert routed.count(False) == 1
    assert routed[0] is False, "the longest product is not first"


@pytest.mark.parametrize("routing", ["T1-KE", "T7-K2-padded"])
def test_what_is_kept_was_compiled_for_the_arguments_given(routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a map of experts and without, from one layer: what is absent decides what is compiled."""
    seen: dict[object, set[tuple[bool, ...]]] = {}

    def absent(values: tuple) -> tuple[bool, ...]:
        return sum((absent(value) if isinstance(value, tuple) else (value is None,) for value in values), ())

    def launch(_self, key: object, _kernel: object, _grid: object, *arguments: object, **_options: int) -> None:
        seen.setdefault(key, set()).add(absent(arguments))

    monkeypatch.setattr(launches.LayerLaunches, "launch", launch)
    weights, ids = make_routing(4, routing)
    kernel = GpuKernel(groups_of(layer_kinds(SIZE_I, SIZE_H)["low_rank-joint"]), SILU)
    for expert_map in (None, torch.arange(4, dtype=torch.int32)):
        kernel(hidden_states(len(ids), SIZE_H, "float32"), weights, ids, expert_map)
    assert seen
    assert {len(kinds) for kinds in seen.values()} == {1}


@pytest.mark.parametrize("kind", ["low_rank-joint", "quantized-3bit"])
def test_one_choice_of_which_some_are_skipped(kind: str) -> None:
    """Nobody writes what belongs to pairs without an expert here, so nobody may read it: with a map and without."""
    spec = layer_kinds(SIZE_I, SIZE_H)[kind]
    ids = torch.tensor([[0], [-1], [2], [3], [-1], [1]], dtype=torch.int32)
    x, weights = hidden_states(6, SIZE_H, "float32"), torch.rand(6, 1, generator=torch.Generator().manual_seed(0))
    check(groups_of(spec), x, weights, ids)
    expert_map = torch.tensor([1, -1, -1, 0], dtype=torch.int32)
    check(groups_of(spec, local_experts=[3, 0]), x, weights, ids, expert_map)


@pytest.mark.parametrize("bits", [(2, 8), (3, 8), (4, 8), (3, 4)])
def test_codes_of_several_widths_in_one_parameter(bits: tuple[int, int]) -> None:
    """Each is read as integers of its own width, wherever the one before it ends."""
    spec = layer_spec(quantized(bits[0], GATE), quantized(bits[1], UP), quantized(4, DOWN))
    weights, ids = make_routing(4, "T1-KE")
    check(groups_of(spec), hidden_states(1, SIZE_H, "float32"), weights, ids)


@pytest.mark.parametrize("kind", ["low_rank-joint", "low_rank-gate_up+down", "low_rank-8bit-center-8bit", "both"])
def test_rows_padded_behind_a_rank(kind: str) -> None:
    weights, ids = make_routing(4, "T13-K2")
    check(groups_of(layer_kinds(SIZE_I, SIZE_H)[kind]), hidden_states(13, SIZE_H, "float32"), weights, ids)


INVARIANT_KINDS = ("low_rank-joint", "bitmap-4bit", "trellis-3bit-no_center", "quantized-3bit", "both", "groups")


@pytest.fixture
def _ordered_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's products as a matrix unit's: no row depends on its place. OpenBLAS adds up by place."""

    def create_dot(
        _self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, acc: TensorHandle, *_given: object
    ) -> TensorHandle:
        product = np.einsum("mk,kn->mn", a.data, b.data, dtype=acc.data.dtype)
        return TensorHandle(product + acc.data, acc.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def invariant_layer(kind: str) -> GpuKernel:
    spec = grouped_layer(SIZE_I, SIZE_H) if kind == "groups" else layer_kinds(SIZE_I, SIZE_H)[kind]
    return GpuKernel(groups_of(spec), SILU, batch_invariant=True)


@pytest.mark.parametrize("kind", INVARIANT_KINDS)
@pytest.mark.usefixtures("_ordered_products")
def test_a_tokens_bits_do_not_depend_on_its_batch(kind: str) -> None:
    """With VLLM_BATCH_INVARIANT=1: alone, among few, and among more pairs of an expert than a block has."""
    kernel = invariant_layer(kind)
    weights, ids = make_routing(4, "T101-K2")
    x = hidden_states(101, SIZE_H, "float32")
    whole = kernel(x, weights, ids)
    parts = [slice(9, 10), slice(0, 1), slice(95, 101), slice(3, 40)]
    for part in parts:
        assert torch.equal(kernel(x[part], weights[part], ids[part]), whole[part])


def test_nothing_is_split_where_bits_must_not_depend_on_the_batch() -> None:
    """Groups are: to as many slabs as the one with most products has, whatever the batch."""
    for kind in INVARIANT_KINDS[:-1]:
        kernel = invariant_layer(kind)
        weights, ids = make_routing(4, "T1-KE")
        kernel(hidden_states(1, SIZE_H, "float32"), weights, ids)
        _, (only,) = kernel._launches(4, torch.empty(0), None)
        assert not only.few
        jobs = [job for products in (*only.first, *only.shrink, *only.last) for job in products.jobs]
        assert jobs
        assert all(job.splits == 1 for job in jobs)


class Census:
    """Which variants launches would be compiled to; nothing runs."""

    def __init__(self) -> None:
        self.variants: set[object] = set()

    def launch(self, _key: object, kernel, _grid: object, *arguments: object, **options: int) -> None:
        names = inspect.signature(kernel.fn).parameters
        values = [
            self.specialized(value)
            for name, value in zip(names, arguments, strict=False)
            if not (isinstance(value, int) and name.startswith(UNSPECIALIZED))
        ]
        self.variants.add((kernel.fn.__name__, *values, *sorted(options.items())))

    def specialized(self, value: object) -> object:
        """An integer stands for itself: it may be a constant of the kernel."""
        if isinstance(value, Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if isinstance(value, tuple):
            return tuple(map(self.specialized, value))
        return value


@pytest.mark.parametrize("kind", ["low_rank-joint", "bitmap-joint", "quantized-3bit", "both", "groups"])
def test_no_number_of_tokens_meets_a_kernel_that_was_not_warmed_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    census = Census()
    monkeypatch.setattr(
        launches.LayerLaunches, "launch", lambda _self, *given, **options: census.launch(*given, **options)
    )
    spec = grouped_layer(16, 64) if kind == "groups" else layer_kinds(16, 64)[kind]
    kernel = GpuKernel(groups_of(spec, "bfloat16", 16, 64), SILU)
    kernel.warm_up(2, torch.bfloat16, torch.device("cpu"), None)
    warm = set(census.variants)
    counts = sorted({*range(1, 300), *range(300, 2**14, 997), *(2**p + d for p in range(8, 15) for d in (-1, 0, 1))})
    x, ids = torch.zeros(counts[-1], 64, dtype=torch.bfloat16), torch.zeros(counts[-1], 2, dtype=torch.int32)
    for tokens in counts:
        kernel(x[:tokens], ids[:tokens].float(), ids[:tokens])
    assert counts[-1] > 2**14
    assert census.variants == warm
    assert len(warm) <= 60


@pytest.mark.parametrize("kind", ["low_rank-joint", "bitmap-joint", "quantized-3bit"])
def test_the_host_does_little_besides_launching(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of Python that a call takes, counted, since times depend on the load; Triton's own are slow ones."""
    monkeypatch.setattr(launches.LayerLaunches, "launch", lambda _self, *_given, **_options: None)
    kernel = GpuKernel(groups_of(layer_kinds(16, 64)[kind], "bfloat16", 16, 64), SILU)
    given = torch.zeros(1, 64, dtype=torch.bfloat16), *make_routing(4, "T1-KE")
    kernel(*given)
    called: list[CodeType] = []

    def note(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call":
            called.append(frame.f_code)

    sys.setprofile(note)
    try:
        kernel(*given)
    finally:
        sys.setprofile(None)
    assert "_Call.combine" in {code.co_qualname for code in called}
    assert [code.co_qualname for code in called if "/triton/" in code.co_filename] == []
    assert len(called) <= MOST_FRAMES


def test_blocks_follow_the_rows_that_an_expert_has_on_all_ranks() -> None:
    """512 tokens of eight choices among 256 experts are 16 rows for each, on one rank of eight as on a single one."""
    sizes = (2048, 7168, "NVIDIA H100", torch.bfloat16, LOW_RANK)
    classes = token_classes(8, 256, *sizes)
    assert [one.tokens for one in classes] == sorted(one.tokens for one in classes)
    found = next(one for one in classes if one.tokens >= 512)
    assert found.config.block_m == 32
    assert found.config == default_config(512, 8, 256, LOW_RANK)


def step_bytes(config: Config, name: str, itemsize: int) -> int:
    """What one stage of a launch holds: in ``hidden`` two tiles of A."""
    blocks = getattr(config, name)
    rows = (2 if name == "hidden" else 1) * config.block_m
    return (rows + blocks.n) * blocks.k * itemsize


@pytest.mark.parametrize("shared", [65536, 101376, 166912, 232448])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_fit_the_card(shared: int, dtype: torch.dtype) -> None:
    for coders in CODERS:
        for tokens in (1, 64, 128, 512, 4096):
            config = default_config(tokens, 8, 64, coders, dtype, shared)
            for name in LAUNCHES:
                assert step_bytes(config, name, dtype.itemsize) * getattr(config, name).stages <= shared


def test_both_sums_of_a_bitmaps_block_fit_beside_what_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On AMD they pass through shared memory at the end: 66,560 bytes of 65,536 with columns as many as elsewhere."""
    monkeypatch.setenv(ROWS_VARIABLE, "100000")
    for shared, columns in ((65536, 32), (101376, 64), (232448, 64)):
        config = default_config(4096, 8, 64, frozenset({"bitmap"}), torch.bfloat16, shared)
        assert (config.block_m, config.hidden.n) == (128, columns)
        assert 2 * config.block_m * config.hidden.n * 4 < shared


@pytest.mark.parametrize("shared", [65536, 101376, 166912, 232448])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_two_blocks_of_few_tokens_fit_the_card(shared: int, dtype: torch.dtype) -> None:
    """With 16 rows Triton holds one step less than there are stages; CUDA keeps 1 KiB for each block."""
    for coders in CODERS:
        for tokens in (1, 64):
            config = default_config(tokens, 8, 64, coders, dtype, shared)
            for name in LAUNCHES:
                held = step_bytes(config, name, dtype.itemsize) * (getattr(config, name).stages - 1)
                assert 2 * held + 1024 <= shared
