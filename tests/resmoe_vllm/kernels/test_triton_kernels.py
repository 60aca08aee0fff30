"""Triton kernels against their plain-torch truths; in Triton's interpreter where there is no GPU.

New memory is full of NaN here, so what a kernel forgets to write, or reads though nobody wrote it, shows.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress_tools.errors import KernelUnsupportedError
from resmoe_vllm import ops
from resmoe_vllm.kernels.activation import SILU, Activation
from resmoe_vllm.kernels.gpu import align, block_sizes, launches
from resmoe_vllm.kernels.gpu import layer as gpu_layer
from resmoe_vllm.kernels.gpu.block_sizes import Blocks, Config, Strategy, TokenClass
from resmoe_vllm.kernels.gpu.plans import GroupPlan, LayerPlan, Plan
from resmoe_vllm.kernels.gpu.tiles import Tile, TileSpec
from resmoe_vllm.kernels.reference import align_ref, combine_ref, fused_moe_ref, hidden_ref, products_ref
from resmoe_vllm.kernels.routing import local_ids
from resmoe_vllm.weights.layer_loader import BoundGroup
from tests.resmoe_vllm.kernels.bounds import Precision, assert_within, hidden_bound, layer_bound, sum_bound
from tests.resmoe_vllm.kernels.test_vllm_kernels import FLOATS, KINDS, ROUTINGS, SIZES, hidden_states, make_routing
from tests.resmoe_vllm.layers import layer_kinds, load_all, new_loader, parameters_of, store_layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# one of each way to hold a residual
MAIN_KINDS = ("low_rank-joint", "bitmap-joint", "quantized-3bit")
# decoded tiles of each kind, and sums of them
TILED_KINDS = (
    "bitmap-down_first-center_up",
    "both",
    "bitmap-4bit",
    "bitmap_rows",
    "quantized-8bit+low_rank+bitmap",
    "trellis-3bit-no_center",
    "trellis-1bit-center-trellis",
)
# whole blocks, so that nothing is masked, and lanes load several octets at once
WHOLE = {"E2-I64-H256": (2, 64, 256)}
REPO = Path(__file__).resolve().parents[3]

SMALL = Blocks(n=32, k=32, warps=4, stages=2)
# several blocks of pairs for one expert, several steps and splits, and the center inside of decoded tiles
RESTORING = Config(
    16, SMALL, SMALL, SMALL, replace(SMALL, n=64), Strategy.CENTER_IN_TILE, programs=24, restore=replace(SMALL, n=16)
)


@pytest.fixture(autouse=True)
def _nan_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def loaded():
    """``loaded(kind, size, dtype, **ranks)`` -> (module, layout) on the device; each once."""
    made: dict[tuple, tuple] = {}

    def get(kind: str, size: str, dtype: str, **ranks: object) -> tuple:
        key = kind, size, dtype, str(ranks)
        if key not in made:
            experts, size_i, size_h = (SIZES | WHOLE)[size]
            layer = store_layer(layer_kinds(size_i, size_h)[kind], experts, size_i, size_h, dtype)
            module, loader = new_loader(layer, **ranks)
            load_all(module, loader, layer)
            made[key] = module.to(DEVICE), loader.groups[0].layout
        return made[key]

    return get


def check(module, layout, weights, ids, x, dtype: str, activation=SILU, expert_map=None) -> None:
    """The layer against ``fused_moe_ref``."""
    tensors = parameters_of(module, layout)
    bound = layout.bind([t.cpu() for t in tensors])
    expected = fused_moe_ref(x, weights, ids, bound, activation, expert_map)
    limit = layer_bound(x, weights, ids, bound, activation, Precision(x.dtype, x.dtype), expert_map)
    on_device = [None if t is None else t.to(DEVICE) for t in (x, weights, ids, expert_map)]
    found = gpu_layer.GpuKernel([BoundGroup(layout.bind(tensors), None)], activation)(*on_device)
    assert found.dtype == x.dtype
    assert found.is_contiguous()
    assert_within(found.cpu(), expected, limit)


@pytest.mark.parametrize(
    "kind, dtype",
    [(kind, dtype) for dtype in FLOATS for kind in (MAIN_KINDS if dtype == "float16" else KINDS)],
)
def test_every_coder(loaded, kind: str, dtype: str) -> None:
    module, layout = loaded(kind, "E4-I33-H67", dtype)
    weights, ids = make_routing(4, "T7-K2-padded")
    check(module, layout, weights, ids, hidden_states(7, 67, dtype), dtype)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_every_routing(loaded, kind: str, routing: str) -> None:
    module, layout = loaded(kind, "E4-I33-H67", "float32")
    weights, ids = make_routing(4, routing)
    check(module, layout, weights, ids, hidden_states(len(ids), 67, "float32"), "float32")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_every_size(loaded, kind: str, size: str) -> None:
    experts, _, size_h = SIZES[size]
    module, layout = loaded(kind, size, "bfloat16")
    weights, ids = make_routing(experts, "T1-KE")
    check(module, layout, weights, ids, hidden_states(1, size_h, "bfloat16"), "bfloat16")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("bitmap")])
@pytest.mark.parametrize("tokens", [3, 70])
def test_whole_blocks(loaded, kind: str, tokens: int) -> None:
    """Few and many tokens: codes are in lanes' order where they are alone."""
    module, layout = loaded(kind, "E2-I64-H256", "float32")
    generator = torch.Generator().manual_seed(1)
    weights, ids = torch.rand(tokens, 2, generator=generator).topk(2)
    check(module, layout, weights, ids.int(), hidden_states(tokens, 256, "float32"), "float32")


@pytest.mark.parametrize("kind", TILED_KINDS)
def test_center_inside_of_decoded_tiles(loaded, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_layer, "token_classes", lambda *shape: (TokenClass(13, RESTORING),))
    module, layout = loaded(kind, "E4-I33-H67", "float32")
    plan = gpu_layer.plan_layer([BoundGroup(layout.bind(parameters_of(module, layout)), None)], center_in_tile=True)
    (group,) = plan.groups
    assert all(side.tile is None or side.center is None for side in (group.gate, group.up, group.down))
    weights, ids = make_routing(4, "T13-K2")
    check(module, layout, weights, ids, hidden_states(13, 67, "float32"), "float32")


def test_more_tokens_than_a_block_and_than_few(loaded) -> None:
    """T = 80: larger blocks, slabs in the model's dtype, the tokens' sums in a launch of their own."""
    module, layout = loaded("both", "E4-I33-H67", "bfloat16")
    generator = torch.Generator().manual_seed(3)
    ids = torch.rand(80, 4, generator=generator).argsort(1)[:, :2].int()
    ids[::5] = torch.tensor([1, -1], dtype=torch.int32)
    check(module, layout, torch.rand(80, 2, generator=generator), ids, hidden_states(80, 67, "bfloat16"), "bfloat16")


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_expert_map(loaded, kind: str) -> None:
    module, layout = loaded(kind, "E4-I33-H67", "float32", local_experts=[3, 0])
    expert_map = torch.tensor([1, -1, -1, 0], dtype=torch.int32)
    weights, ids = make_routing(4, "T7-K2-padded")
    check(module, layout, weights, ids, hidden_states(7, 67, "float32"), "float32", expert_map=expert_map)


@pytest.mark.parametrize("kind", ["low_rank-gate_up+down", "bitmap-gate_up+down", "bitmap-4bit"])
def test_rows_of_a_rank(loaded, kind: str) -> None:
    """Tensor parallelism packs bitmap values: each expert begins where ``resmoe_value_starts`` says."""
    module, layout = loaded(kind, "E4-I33-H67", "float32", tp_size=3, tp_rank=1)
    weights, ids = make_routing(4, "T7-K2-padded")
    check(module, layout, weights, ids, hidden_states(7, 67, "float32"), "float32")


def test_weights_that_are_not_int32_or_contiguous(loaded) -> None:
    module, layout = loaded("low_rank-joint", "E4-I33-H67", "float32")
    weights, ids = make_routing(4, "T7-K2-padded")
    x = hidden_states(7, 2 * 67, "float32")[:, ::2]
    check(module, layout, weights.mT.contiguous().mT, ids.long(), x, "float32")


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("mapped", [False, True], ids=["all_experts", "expert_map"])
@pytest.mark.parametrize("routing", [name for name in ROUTINGS if name != "T0-K2"])
def test_align(routing: str, mapped: bool, block: int) -> None:
    _, ids = make_routing(4, routing)
    expert_map = torch.tensor([2, -1, 0, 1], dtype=torch.int32) if mapped else None
    experts = 3 if mapped else 4
    pairs, blocks, length = align_ref(ids, block, experts, expert_map)
    assert length % block == 0
    assert align.max_blocks(ids.numel(), block, experts) >= length // block
    found = align.align(ids.to(DEVICE), block, experts, None if expert_map is None else expert_map.to(DEVICE))
    assert found[2].tolist() == [length]
    assert torch.equal(found[0][:length].cpu(), pairs)
    assert torch.equal(found[1][: length // block].cpu(), blocks)


@pytest.mark.parametrize("experts", [16, 32, 64])
def test_align_of_powers_of_two_with_padding(experts: int) -> None:
    """Padding needs a bin of its own beside one for each expert."""
    ids = torch.randint(-1, experts, (40, 2), generator=torch.Generator().manual_seed(0)).int()
    assert (ids < 0).any()
    pairs, blocks, length = align_ref(ids, 16, experts, None)
    found = align.align(ids.to(DEVICE), 16, experts, None)
    assert found[2].tolist() == [length]
    assert torch.equal(found[0][:length].cpu(), pairs)
    assert torch.equal(found[1][: length // 16].cpu(), blocks)


def test_a_bitmap_wider_than_a_step_of_counting() -> None:
    """Kept values left of a block are counted 256 columns at a time."""
    layer = store_layer(layer_kinds(5, 600)["bitmap-joint"], 2, 5, 600, "float32")
    module, loader = new_loader(layer)
    load_all(module, loader, layer)
    weights, ids = make_routing(2, "T1-KE")
    check(module.to(DEVICE), loader.groups[0].layout, weights, ids, hidden_states(1, 600, "float32"), "float32")


def test_align_over_several_chunks() -> None:
    ids = torch.randint(-1, 40, (700, 4), generator=torch.Generator().manual_seed(0)).int()
    pairs, blocks, length = align_ref(ids, 32, 40, None)
    found = align.align(ids.to(DEVICE), 32, 40, None)
    assert found[2].tolist() == [length]
    assert torch.equal(found[0][:length].cpu(), pairs)
    assert torch.equal(found[1][: length // 32].cpu(), blocks)


def call_of(ids: Tensor, expert_map: Tensor | None, size_i: int, size_h: int):
    """A call whose plan holds sizes only."""
    nothing = Plan(None, None, None)
    plan = LayerPlan([GroupPlan(nothing, nothing, nothing, 3)], size_i, size_h)
    x = hidden_states(len(ids), size_h, "float32").to(DEVICE)
    layer = launches.LayerLaunches(plan, SILU, TokenClass(len(ids), RESTORING))
    return layer.call(x, torch.ones(ids.shape, device=DEVICE), ids.to(DEVICE), expert_map)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("routed", [False, True])
def test_products(routed: bool, transposed: bool) -> None:
    """N and k odd, several splits; twice in one launch, the second after the first's programs and slabs."""
    generator = torch.Generator().manual_seed(0)
    _, ids = make_routing(3, "T7-K2-padded")
    call = call_of(ids, None, 5, 131)
    rows = torch.randn((3, 41, 131) if transposed else (3, 131, 41), generator=generator)
    tile = Tile(own=rows.to(DEVICE), own_stride=rows.stride(0)), TileSpec(own_bits=16)
    product = launches.Product(131, 41, 131, *rows.shape[1:])
    spec = launches.ProductSpec(routed, 2 if routed else 1, transposed)
    jobs = [launches._Job(tile, spec, product, splits=2, slab=slab) for slab in (0, 2)]
    a = call.x.cpu().repeat_interleave(2, 0) if routed else call.x.cpu()
    own = local_ids(ids, None).flatten() if routed else None
    expected = products_ref(a, rows, own, transposed=transposed)
    found = torch.full((4, len(a), 41), float("nan"), device=DEVICE)
    call.products("both", 0, launches._Products(jobs, SMALL), [call.x] * 2, [found] * 2)
    sizes = products_ref(a.abs(), rows.abs(), own, transposed=transposed)
    for slabs in found.cpu().split(2):
        wanted = slice(None) if own is None else own >= 0
        assert_within(slabs.sum(0)[wanted], expected[wanted], sum_bound(sizes, 131)[wanted])


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_hidden(loaded, kind: str) -> None:
    module, layout = loaded(kind, "E4-I33-H67", "float32")
    weights, ids = make_routing(4, "T7-K2-padded")
    x = hidden_states(7, 67, "float32")
    bound = layout.bind(parameters_of(module, layout))
    plan = gpu_layer.plan_layer([BoundGroup(bound, None)], center_in_tile=False)
    layer = launches.LayerLaunches(plan, SILU, TokenClass(7, RESTORING))
    cpu = layout.bind([t.cpu() for t in parameters_of(module, layout)])
    found = layer.call(x.to(DEVICE), weights.to(DEVICE), ids.to(DEVICE), None).hidden().cpu()
    expected = hidden_ref(x, weights, ids, cpu, SILU)
    limits = torch.stack([hidden_bound(x, cpu, e, SILU) for e in range(4)])
    pairs = torch.arange(14)
    limit = limits[ids.flatten().clamp(min=0), pairs // 2] * weights.double().flatten()[:, None]
    here = ids.flatten() >= 0
    assert_within(found[here], expected[here], limit[here])


@pytest.mark.parametrize("mapped", [False, True], ids=["all_experts", "expert_map"])
def test_combine(mapped: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    _, ids = make_routing(3, "T7-K2-padded")
    expert_map = torch.tensor([-1, 0, 1], dtype=torch.int32) if mapped else None
    on_device = None if expert_map is None else expert_map.to(DEVICE)
    call = call_of(ids, on_device, 5, 67)
    pairs, tokens = torch.randn(3, 14, 67, generator=generator), torch.randn(2, 7, 67, generator=generator)
    pairs[:, local_ids(ids, expert_map).flatten() < 0] = float("nan")
    for name, whole in (("both", tokens), ("pairs", None)):
        out = torch.empty(7, 67, device=DEVICE)
        on_tokens = (None, 0) if whole is None else (whole.to(DEVICE), len(whole))
        call.combine(name, out, pairs.to(DEVICE), len(pairs), *on_tokens, pair_map=on_device)
        expected = combine_ref(pairs, whole, ids, expert_map, torch.float32)
        sizes = combine_ref(pairs.abs(), None if whole is None else whole.abs(), ids, expert_map, torch.float32)
        assert_within(out.cpu(), expected, sum_bound(sizes, 8))


def test_kernel_table_has_cuda() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ops.check_kernel(ops.CODERS, dtype, "cuda")
    assert ops.KERNELS["cuda"].__module__ == "resmoe_vllm.kernels.gpu.dispatch"


def test_refusals(loaded) -> None:
    module, layout = loaded("low_rank-joint", "E4-I33-H67", "float32")
    weights, ids = make_routing(4, "T7-K2-padded")
    x, bound = hidden_states(7, 67, "float32"), layout.bind(parameters_of(module, layout))
    kernel = gpu_layer.GpuKernel([BoundGroup(bound, None)], SILU)
    with pytest.raises(KernelUnsupportedError, match="no 'relu'"):
        gpu_layer.GpuKernel([BoundGroup(bound, None)], Activation("relu"))(x, weights, ids)
    with pytest.raises(KernelUnsupportedError, match=r"float64"):
        kernel(x.double(), weights, ids)
    with pytest.raises(KernelUnsupportedError, match=r"expected x \[T, 67\] .* found x \[7, 66\]"):
        kernel(x[:, :66], weights, ids)
    with pytest.raises(KernelUnsupportedError, match=r"expected x \[T, 67\] .* topk_ids \[6, 2\]"):
        kernel(x, weights, ids[:6])
    with pytest.raises(KernelUnsupportedError, match="tensor parallelism"):
        gpu_layer.plan_layer(
            [BoundGroup(replace(bound, intermediate_size=2**20, hidden_size=2**10), None)], center_in_tile=False
        )


def test_tuned_sizes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sizes, "CONFIGS", tmp_path)
    shape = (64, 2048, 1024, "NVIDIA H200", torch.bfloat16, frozenset({"low_rank"}))
    name = "E=64,H=2048,I=1024,device_name=NVIDIA_H200,dtype=bfloat16,method=low_rank.json"
    assert block_sizes.config_file(*shape) == name
    tuned = {1: replace(RESTORING, programs=1), 64: replace(RESTORING, programs=64)}
    block_sizes.write_configs(tmp_path / name, tuned)
    assert json.loads((tmp_path / name).read_text())["64"]["hidden"] == {"n": 32, "k": 32, "warps": 4, "stages": 2}
    assert block_sizes.pick_config(3, 8, *shape) == tuned[1]
    assert block_sizes.pick_config(4096, 8, *shape) == tuned[64]
    other = (*shape[:-1], frozenset({"bitmap"}))
    assert block_sizes.pick_config(1, 8, *other) == block_sizes.default_config(1, 8, 64, frozenset({"bitmap"}))
    assert block_sizes.pick_config(4096, 8, *other).strategy == Strategy.RESTORED


def test_blocks_that_spill_elsewhere_are_others_there() -> None:
    """H100, L40S, MI300X: what the compile matrix shows of them."""
    cards = (232448, 101376, 65536)
    trellis = [block_sizes.default_config(512, 8, 64, frozenset({"trellis"}), shared=shared) for shared in cards]
    assert [config.block_m for config in trellis] == [64, 64, 64]
    assert [config.hidden.warps for config in trellis] == [4, 8, 4]
    for tokens in (1, 4096):
        of = [
            block_sizes.default_config(tokens, 8, 64, frozenset({"bitmap"}), torch.float32, shared) for shared in cards
        ]
        assert [config.hidden.k for config in of] == [32, 16, 32]


def test_kernels_compile_for_hopper() -> None:
    """Down to machine code, by the compiler and not the interpreter; needs no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.resmoe_vllm.kernels.hopper", "low_rank", "bitmap"]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("compiled for sm_90")
    for kernel in ("_products_kernel", "_hidden_kernel"):
        found = [line.split() for line in lines if kernel in line]
        assert len(found) >= 4
        assert min(int(words[-2]) for words in found) > 0, "no product runs on the matrix units"
        assert max(int(words[-6]) for words in found) == 0, "registers are spilled"
