"""The ARM64 paths: they compile without a warning, and give the reference, and AVX2's bits, under emulation."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from resmoe_vllm.kernels.activation import SILU
from resmoe_vllm.kernels.cpu import build, native
from resmoe_vllm.kernels.cpu.rows8 import rows8_ref
from resmoe_vllm.kernels.reference import fused_moe_ref
from resmoe_vllm.weights.bound import ResMoEWeights
from tests.resmoe_vllm.kernels.arm64 import emulator
from tests.resmoe_vllm.kernels.arm64.emulator import LayerCall, Rows8Call
from tests.resmoe_vllm.kernels.bounds import Precision, assert_within, layer_bound
from tests.resmoe_vllm.kernels.test_native import CODES, ONE, SUMS, TRELLIS, bound, coded_layer
from tests.resmoe_vllm.kernels.test_vllm_kernels import hidden_states, make_routing

MISSING = emulator.missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"no {' and no '.join(MISSING)}: {emulator.INSTALL}; then make arm, or these tests again"
    ),
]
DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module", params=emulator.PROCESSORS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels, compiled for a path; half a minute."""
    folder = tmp_path_factory.mktemp("arm64")
    done = emulator.compile_for(request.param, folder)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / request.param


def limit(x: Tensor, weights: Tensor, ids: Tensor, layer: ResMoEWeights) -> Tensor:
    """What rounding allows: codes are multiplied with 16 bits, or with twice 16 of fp32 numbers."""
    products = torch.float32 if x.dtype == torch.float32 else torch.int16
    return layer_bound(x, weights, ids, layer, SILU, Precision(products, x.dtype))


def test_every_path_has_an_emulated_processor() -> None:
    assert set(emulator.PROCESSORS) == {name for name, path in build.PATHS.items() if path.instruction_set == "ARM64"}


def test_every_coder_gives_the_reference(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And, bit for bit, what AVX2 gives: lanes, tiles and the order of sums are the same."""
    calls = []
    for size_i, size_h in ((9, 192), (33, 67)):
        for kind in SUMS + TRELLIS:
            for dtype in DTYPES:
                layer = bound(kind, dtype, size_i, size_h)
                for routing in ("T1-KE", "T13-K2"):
                    weights, ids = make_routing(4, routing)
                    calls.append(LayerCall(layer, hidden_states(len(ids), size_h, dtype), weights, ids, threads=2))
    found = emulator.run(program, calls, tmp_path)
    for call, own in zip(calls, found, strict=True):
        args = call.x, call.weights, call.ids, call.layer
        assert_within(own, fused_moe_ref(*args, SILU), limit(*args))
    if "avx2" in build.available_paths():
        monkeypatch.setenv(build.PATH_VARIABLE, "avx2")
        library = native.open_library(str(build.build()))
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            for call, own in zip(calls, found, strict=True):
                assert torch.equal(own, native.NativeKernel(library, call.layer, SILU)(call.x, call.weights, call.ids))
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [2, 3, 65])
def test_a_tokens_bits_do_not_depend_on_its_batch(size: int, program: Path, tmp_path: Path) -> None:
    """Its sums run the same way, decoded for one token or for many."""
    for columns in (128, 333):
        x = hidden_states(size, columns, "bfloat16")
        generator = torch.Generator().manual_seed(5)
        ids = torch.rand(size, 4, generator=generator).argsort(1).int()
        weights = torch.rand(size, 4, generator=generator)
        for kind in SUMS + TRELLIS:
            layer = bound(kind, "bfloat16", 40, columns)
            some = [slice(0, size), *(slice(t, t + 1) for t in sorted({0, 1, size // 2, size - 1}))]
            calls = [LayerCall(layer, x[t], weights[t], ids[t]) for t in some]
            whole, *alone = emulator.run(program, calls, tmp_path)
            for token, own in zip(some[1:], alone, strict=True):
                assert torch.equal(whole[token], own)


def test_no_sum_overflows(program: Path, tmp_path: Path) -> None:
    """Long rows of the largest levels of each sign, times numbers that are all as large as they can be."""
    x = torch.tensor([1.0, -1.0, 0.99609375])[:, None].expand(3, 8192).contiguous()
    calls = [
        LayerCall(coded_layer(bits, trellis, 8, 8192, code), x, *ONE)
        for bits, trellis in CODES
        for code in (0, 2**bits - 1)
    ]
    for call, own in zip(calls, emulator.run(program, calls, tmp_path), strict=True):
        args = x, *ONE, call.layer
        assert_within(own, fused_moe_ref(*args, SILU), limit(*args))


def test_rows_in_8_bits_give_the_reference(program: Path, tmp_path: Path) -> None:
    """Odd sizes, with a bias and without; a token's bits are the same alone."""
    generator = torch.Generator().manual_seed(0)
    calls = []
    for tokens, rows, columns in ((1, 5, 3), (4, 7, 77), (7, 9, 256)):
        codes = torch.randint(-127, 128, (rows, columns), generator=generator).to(torch.int8)
        scales, bias = torch.rand(rows, generator=generator).bfloat16(), torch.randn(rows, generator=generator)
        x = torch.randn(tokens, columns, generator=generator)
        calls += [Rows8Call(x, codes, scales, bias, threads=2), Rows8Call(x, codes, scales, None)]
        calls.append(Rows8Call(x[-1:].clone(), codes, scales, None))
    found = emulator.run(program, calls, tmp_path)
    for call, own in zip(calls, found, strict=True):
        expected = rows8_ref(call.x, call.codes, call.scales[:, None], call.bias)
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-3)
    for whole, alone in zip(found[1::3], found[2::3], strict=True):
        assert torch.equal(whole[-1:], alone)
