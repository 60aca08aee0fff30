"""Products with 8-bit rows on a CPU: C++ and torch against the truth, whatever the sizes, and alone as in a batch."""

import pytest
import torch

from compress_tools.format.rest import encode_rows
from resmoe_vllm.kernels.cpu import rows8 as kernels
from resmoe_vllm.kernels.cpu.rows8 import rows8, rows8_ref

# Rows of a tile, of a strip and one more; columns of a vector, of a block and odd ones; tokens of a block and one more.
SIZES = [(1, 1, 1), (1, 4, 8), (2, 3, 7), (3, 33, 33), (4, 8, 64), (5, 129, 100), (33, 7, 513), (97, 9, 40)]


def rows(tokens: int, outputs: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens + outputs + columns)
    codes, scales = encode_rows(torch.randn(outputs, columns, generator=generator))
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    return x, codes, scales, torch.randn(outputs, generator=generator).to(dtype)


@pytest.fixture(params=["C++", "torch"])
def strategy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(kernels, "_load", lambda: None)
    else:
        assert kernels._load() is not None, "no C++ kernel here"
    return str(request.param)


@pytest.mark.usefixtures("strategy")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_products_are_the_references(size: tuple[int, int, int], biased: bool) -> None:
    x, codes, scales, bias = rows(*size)
    shift = bias if biased else None
    torch.testing.assert_close(rows8(x, codes, scales, shift), rows8_ref(x, codes, scales, shift), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("strategy")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_are_in_the_inputs_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 40)  # several blocks of rows
    x, codes, scales, bias = rows(6, 7, 33, dtype)
    out = rows8(x, codes, scales, bias)
    assert out.dtype == dtype
    torch.testing.assert_close(out, rows8_ref(x, codes, scales, bias), rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("strategy")
def test_no_tokens_and_rows_of_zeros() -> None:
    x, codes, scales, _ = rows(3, 5, 16)
    assert rows8(x[:0], codes, scales, None).shape == (0, 5)
    codes[2], scales[2] = 0, 0
    assert not rows8(x, codes, scales, None)[:, 2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [2, 3, 96, 97, 200])
def test_a_token_alone_and_in_a_batch(tokens: int, dtype: torch.dtype) -> None:
    """Bit for bit, in C++."""
    x, codes, scales, bias = rows(tokens, 133, 577, dtype)
    whole = rows8(x, codes, scales, bias)
    for token in range(len(x)):
        assert torch.equal(rows8(x[token : token + 1], codes, scales, bias), whole[token : token + 1])


def test_threads_share_the_rows() -> None:
    """Bit for bit, in C++; more threads than there is work for, too."""
    library = kernels._load()
    assert library is not None
    x, codes, scales, bias = rows(5, 70, 577)
    one, many = torch.empty(5, 70), torch.empty(5, 70)
    kernels._call(library, x, codes, scales, bias, one, 1)
    for threads in (2, 3, 7):
        kernels._call(library, x, codes, scales, bias, many.zero_(), threads)
        assert torch.equal(one, many)


def test_one_large_number_does_not_drown_the_others() -> None:
    """A number is off by at most 2^-15 of the largest of its 512, however large that is: half of it here."""
    x, codes, scales, _ = rows(3, 40, 1024, torch.bfloat16)
    x[:, 700] = 1024.0
    weights = codes.double() * scales.double()
    expected = x.double() @ weights.T
    error = (rows8(x, codes, scales, None).double() - expected).abs()
    rounding = 2.0**-8 * expected.abs()  # to bfloat16
    assert (error <= rounding + 2.0**-16 * 1024 * weights[:, 512:].abs().sum(1)).all()


def test_the_largest_codes_do_not_overflow() -> None:
    x, codes = torch.full((1, 4096), 100.0), torch.full((2, 4096), 127, dtype=torch.int8)
    scales = torch.tensor([[1.0], [2.0]]).bfloat16()
    assert rows8(x, codes, scales, None).tolist() == [[127 * 100 * 4096, 2 * 127 * 100 * 4096]]


@pytest.mark.parametrize("error", [OSError("found neither g++ nor clang++")])
def test_without_a_compiler_torch_serves_and_the_log_says_so(
    error: OSError, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(kernels.native_library, "build", fail)
    kernels._load.cache_clear()
    try:
        assert kernels.kernel_name() == "torch, decoded for each call"
        assert "no C++ kernel for 8-bit rows, torch serves, slower, same result: found neither" in caplog.text
    finally:
        kernels._load.cache_clear()
