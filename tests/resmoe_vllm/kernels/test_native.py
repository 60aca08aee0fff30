"""The C++ kernel: threads, its instruction sets, rounding, and not a byte beyond what it was given."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress_tools import native_library
from compress_tools.errors import KernelUnsupportedError
from compress_tools.format.dtypes import DTYPES
from compress_tools.format.packing import pack_codes
from compress_tools.format.schema import Projection, ResidualPart
from resmoe_vllm.kernels.activation import SILU
from resmoe_vllm.kernels.cpu import build, native, plain_torch, self_test, structs
from resmoe_vllm.kernels.reference import fused_moe_ref
from resmoe_vllm.weights.bound import Coded, QuantizedWeights, ResMoEWeights
from tests.resmoe_vllm import twins
from tests.resmoe_vllm.kernels.bounds import Precision, assert_within, layer_bound
from tests.resmoe_vllm.kernels.test_vllm_kernels import hidden_states, make_routing, op_products
from tests.resmoe_vllm.layers import bound_weights, layer_kinds, load_all, new_loader, store_layer

LIBRARY = native.load()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no C++ kernel here")

REPO = Path(__file__).resolve().parents[3]
# every coder, in every phase
SUMS = ("both", "low_rank-8bit-center-8bit", "bitmap-4bit", "bitmap_rows", "quantized-8bit+low_rank+bitmap")
TRELLIS = ("trellis-4bit", "trellis-3bit-no_center", "trellis-2bit+low_rank", "trellis-1bit-center-trellis")


def bound(kind: str, dtype: str, size_i: int = 33, size_h: int = 67) -> ResMoEWeights:
    """A loaded layer of four experts."""
    layer = store_layer(layer_kinds(size_i, size_h)[kind], 4, size_i, size_h, dtype)
    module, loader = new_loader(layer)
    load_all(module, loader, layer)
    return bound_weights(module, loader)


def check(found: Tensor, x: Tensor, weights: Tensor, ids: Tensor, layer: ResMoEWeights) -> None:
    """Within the bound of the reference."""
    limit = layer_bound(x, weights, ids, layer, SILU, Precision(op_products(x.dtype), x.dtype))
    assert_within(found, fused_moe_ref(x, weights, ids, layer, SILU), limit)


@pytest.fixture
def threads() -> Iterator[None]:
    """As many threads as before, afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [2, 3, 5, 16])
@pytest.mark.parametrize("kind", SUMS)
def test_any_number_of_threads_gives_the_reference(kind: str, count: int) -> None:
    """16 are more than there are blocks of rows."""
    layer = bound(kind, "float32")
    weights, ids = make_routing(4, "T13-K2")
    x = hidden_states(13, 67, "float32")
    torch.set_num_threads(count)
    check(native.NativeKernel(LIBRARY, layer, SILU)(x, weights, ids), x, weights, ids, layer)


@pytest.mark.parametrize("kind", SUMS)
def test_an_expert_that_a_token_chose_twice_counts_twice(kind: str) -> None:
    layer = bound(kind, "float32")
    weights, ids = make_routing(4, "T13-K2")
    ids[1::2, 1] = ids[1::2, 0]
    x = hidden_states(13, 67, "float32")
    check(native.NativeKernel(LIBRARY, layer, SILU)(x, weights, ids), x, weights, ids, layer)
    check(plain_torch.fused_moe(x, weights, ids, layer, SILU), x, weights, ids, layer)


@pytest.mark.parametrize("kind", SUMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_result_is_rounded_to_nearest(kind: str, dtype: str) -> None:
    kernel = native.NativeKernel(LIBRARY, bound(kind, dtype), SILU)
    weights, ids = make_routing(4, "T13-K2")
    x = hidden_states(13, 67, dtype)
    exact = kernel(x.float(), weights, ids)
    assert exact.dtype == torch.float32
    assert torch.equal(kernel(x, weights, ids), exact.to(DTYPES[dtype]))


def assert_own_bits(layer: ResMoEWeights, columns: int, dtype: str) -> None:
    """The reference, and each token's own bits in a batch."""
    kernel = native.NativeKernel(LIBRARY, layer, SILU)
    weights, ids = make_routing(4, "T13-K2")
    x = hidden_states(13, columns, dtype)
    together = kernel(x, weights, ids)
    check(together, x, weights, ids, layer)
    for size in (1, 2, 3, 5):
        some = [slice(begin, begin + size) for begin in range(0, 13, size)]
        assert torch.equal(torch.cat([kernel(x[own], weights[own], ids[own]) for own in some]), together)


@pytest.mark.parametrize("kind", layer_kinds(40, 128))
@pytest.mark.parametrize(("rows", "columns"), [(5, 2112), (1100, 64)])
def test_rows_of_several_blocks(kind: str, rows: int, columns: int) -> None:
    """Rows longer than a block of sums, and more of them than are computed together."""
    for dtype in ("float32", "bfloat16"):
        assert_own_bits(bound(kind, dtype, rows, columns), columns, dtype)


@pytest.mark.parametrize("by", [64, 128, None])
@pytest.mark.parametrize(
    ("bits", "coder"),
    [(4, twins.trellis), (4, twins.quantized), (8, twins.quantized), (3, twins.trellis), (2, twins.quantized)],
)
def test_groups_of_several_pieces_of_rows(bits: int, coder: Callable[..., ResidualPart], by: int | None) -> None:
    """Down is read some rows at a time by one token, each row chunk by chunk; 333 columns end within a vector."""
    for columns in (333, 1088):
        spec = twins.layer_spec(coder(bits, *twins.PROJECTIONS, by=by), bits=8)
        layer = store_layer(spec, 4, 75, columns, "bfloat16")
        module, loader = new_loader(layer)
        load_all(module, loader, layer)
        assert_own_bits(bound_weights(module, loader), columns, "bfloat16")


@pytest.mark.parametrize("path", build.PATHS)
def test_every_path_gives_the_reference(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that this processor would not run by itself."""
    monkeypatch.setenv(build.PATH_VARIABLE, path)
    if path not in build.available_paths():
        with pytest.raises(KernelUnsupportedError, match=f"RESMOE_CPU_PATH is '{path}'; this processor runs"):
            build.build()
        return
    library = native.open_library(str(build.build()))
    for kind in SUMS + TRELLIS:
        for dtype in ("float32", "bfloat16", "float16"):
            layer = bound(kind, dtype, 9, 192)
            for routing in ("T1-KE", "T13-K2"):
                weights, ids = make_routing(4, routing)
                x = hidden_states(len(ids), 192, dtype)
                found = native.NativeKernel(library, layer, SILU)(x, weights, ids)
                check(found, x, weights, ids, layer)


def test_a_path_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.PATH_VARIABLE, "mmx")
    with pytest.raises(KernelUnsupportedError, match="RESMOE_CPU_PATH is 'mmx'"):
        build.build()


def coded(bits: int, trellis: bool, experts: int, rows: int, columns: int, code: int | None = None) -> Coded:
    """Random codes, or one code everywhere."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (experts, rows, columns), generator=generator).byte()
    if code is not None:
        codes.fill_(code)
    scales = (columns**-0.5 / 2**bits * (1 + torch.rand(experts, rows, 1, generator=generator))).bfloat16()
    return Coded(pack_codes(codes, bits), scales, bits, columns, None, trellis)


def coded_layer(bits: int, trellis: bool, rows: int, columns: int, code: int | None = None) -> ResMoEWeights:
    """One expert of nothing but codes."""
    parts: dict[Projection, Coded] = {
        p: coded(bits, trellis, 1, rows, columns, code) for p in ("gate_proj", "up_proj", "down_proj")
    }
    residual = (QuantizedWeights(tuple(parts), parts),)
    return ResMoEWeights(columns, rows, {}, residual, frozenset({"trellis" if trellis else "quantized"}))


CODES = [(bits, False) for bits in (2, 3, 4, 8)] + [(bits, True) for bits in (1, 2, 3, 4)]
ONE = torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int32)


@pytest.mark.parametrize("path", build.PATHS)
def test_no_sum_overflows(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest rows of the largest levels of each sign, times numbers that are all as large as they can be."""
    if path not in build.available_paths():
        pytest.skip(f"this processor has no {path}")
    monkeypatch.setenv(build.PATH_VARIABLE, path)
    library = native.open_library(str(build.build()))
    for bits, trellis in CODES:
        for code in (0, 2**bits - 1):
            layer = coded_layer(bits, trellis, 40, 32768, code)
            x = torch.tensor([1.0, -1.0, 0.99609375])[:, None].expand(3, 32768).contiguous()
            check(native.NativeKernel(library, layer, SILU)(x, *ONE), x, *ONE, layer)


@pytest.mark.parametrize(("bits", "trellis"), CODES)
@pytest.mark.parametrize(("largest", "limit"), [(None, 2**-12), (300.0, 2**-10)])
def test_codes_multiply_more_exactly_than_bf16(bits: int, trellis: bool, largest: float | None, limit: float) -> None:
    """Numbers that bf16 holds, one of them far larger than its block; rounding to bf16 leaves 2^-9 of each number."""
    layer = coded_layer(bits, trellis, 64, 2048)
    x = hidden_states(3, 2048, "bfloat16").float()
    if largest is not None:
        x[:, 700] = largest
    expected = fused_moe_ref(x, *ONE, layer, SILU)
    wrong = native.NativeKernel(LIBRARY, layer, SILU)(x, *ONE) - expected
    assert expected.norm() > 0
    assert wrong.norm() / expected.norm() < limit


def test_no_byte_beyond_a_tensor_is_read() -> None:
    """Each of the layer's tensors ends where a page begins that may not be read."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.resmoe_vllm.kernels.guarded"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"{6 * len(layer_kinds(33, 67))} layers read nothing else"


def test_a_struct_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fields that change places leave the structs' sizes as they were."""
    self_test.check_structs(LIBRARY)
    fields = structs.struct_fields()
    assert len(fields) > 30
    for wrong in ([fields[1], fields[0], *fields[2:]], fields[:-1], [*fields, "Layer.more 200 8"]):
        monkeypatch.setattr(self_test, "struct_fields", lambda wrong=wrong: wrong)
        with pytest.raises(KernelUnsupportedError, match=r"where structs\.py has"):
            self_test.check_structs(LIBRARY)


def test_a_library_that_fails_its_self_test_does_not_enter_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(library: object) -> None:
        raise KernelUnsupportedError("wrong")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build.self_test, "check_library", fail)
    monkeypatch.setattr(native_library, "FLAGS", tuple(flag for flag in native_library.FLAGS if flag != "-O3"))
    with pytest.raises(KernelUnsupportedError, match="wrong"):
        build.build("-O0")
    assert list((tmp_path / "resmoe").iterdir()) == []
