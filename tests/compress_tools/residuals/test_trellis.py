"""Trellis codes: the search is exact, and the same in C++ and torch; scales, prediction, and what the tables give."""

import itertools
import subprocess

import pytest
import torch
from torch import Tensor

from compress_tools import native_library
from compress_tools.format.quantization import expand_scales
from compress_tools.format.trellis import state_levels, tables, trellis_levels
from compress_tools.residuals.quantizer import quantize_rows
from compress_tools.residuals.trellis import first_scales, predicted_errors, restored_rows, trellis_rows
from compress_tools.residuals.trellis_profiles import PROFILES
from compress_tools.residuals.viterbi import native, search, train_tables
from compress_tools.residuals.viterbi.plain_torch import FRACTION_BITS, to_fixed, torch_search

BITS = (1, 2, 3, 4)
each_width = pytest.mark.parametrize("bits", BITS)


@pytest.fixture(scope="module")
def library() -> native.Library:
    try:
        return native.load()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no compiler here")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def restored(matrix: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    symbols, scales = trellis_rows(matrix, bits, group_size)
    assert symbols.shape == (len(matrix), -(-matrix.shape[1] // 8) * 8)
    return restored_rows(symbols, scales, bits, matrix.shape[1], group_size)


def lost(matrix: Tensor, found: Tensor) -> float:
    return float((matrix - found).square().sum() / matrix.square().sum())


@each_width
def test_levels_are_sums_of_table_entries(bits: int) -> None:
    """SPEC.md, 4, column by column; a row begins with what its end holds."""
    generator = torch.Generator().manual_seed(bits)
    symbols = torch.randint(2**bits, (3, 32), generator=generator).byte()
    width = 3 if bits == 3 else 4
    for row, found in zip(symbols.tolist(), trellis_levels(symbols, bits).tolist(), strict=True):
        state = 0
        for symbol in row[-12:]:
            state = (state << bits | symbol) % 4096
        for symbol, level in zip(row, found, strict=True):
            state = (state << bits | symbol) % 4096
            fields = [state >> width * number & 2**width - 1 for number in range(12 // width)]
            assert level == sum(int(table[field]) for table, field in zip(tables(bits), fields, strict=True))
    assert int(state_levels(bits).abs().max()) <= 127


@each_width
def test_no_other_symbols_are_nearer(bits: int) -> None:
    """All symbols of a few columns are tried, at several places of a row."""
    x = to_fixed(40 * noise(3, 48, seed=bits))
    symbols, levels = torch_search(x, bits, 48, torch.ones(3, 1))
    assert torch.equal(trellis_levels(symbols, bits), levels)
    every = torch.tensor(list(itertools.product(range(2**bits), repeat={4: 3, 3: 4}.get(bits, 6))), dtype=torch.uint8)
    for start in (11, 20, 30):
        for row, own, chosen in zip(x.double() / 2**FRACTION_BITS, levels.double(), symbols, strict=True):
            others = chosen.repeat(len(every), 1)
            others[:, start : start + every.shape[1]] = every
            found = (row - trellis_levels(others, bits).double()).square().sum(1)
            assert float((row - own).square().sum()) <= float(found.min()) + 1e-9


@each_width
def test_no_column_is_worse_than_others(bits: int) -> None:
    """Neither where a row begins nor where it ends: it bites its tail."""
    matrix = noise(300, 64, seed=bits)
    errors = (matrix - restored(matrix, bits)).square().mean(0)
    assert errors[[0, 1, 2, -3, -2, -1]].max() < 1.4 * errors[20:44].mean()


@each_width
@pytest.mark.parametrize(("columns", "width"), [(1, 1), (8, 8), (64, 32), (133, 32), (304, 304)])
def test_cpp_finds_what_torch_finds(library: native.Library, bits: int, columns: int, width: int) -> None:
    """Bit for bit, outliers and groups of other weight included; also as a smaller processor would."""
    generator = torch.Generator().manual_seed(columns)
    rows = 45 * noise(5, columns, seed=bits)
    rows[0, :: max(1, columns // 3)] *= 40
    ratios = torch.exp(4 * torch.randn(5, -(-columns // width), generator=generator))
    x = to_fixed(rows)
    expected = torch_search(x, bits, width, ratios)
    for found in (native.search(library, x, bits, width, ratios), search.best_symbols(x, bits, width, ratios)):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_a_smaller_processor_finds_the_same(library: native.Library) -> None:
    import ctypes

    smaller = ctypes.CDLL(str(native_library.build(native.SOURCE, "-mno-avx2", "-mno-avx512f")))
    x, ones = to_fixed(45 * noise(3, 200)), torch.ones(3, 1)
    for bits in BITS:
        found, expected = (native.search(own, x, bits, 200, ones) for own in (smaller, library))
        assert all(map(torch.equal, found, expected))


@each_width
@pytest.mark.parametrize("group_size", [None, 32, 128])
def test_scales_are_the_least_squares_fit_to_their_levels(bits: int, group_size: int | None) -> None:
    matrix = 1e-3 * noise(6, 200, seed=bits)
    symbols, scales = trellis_rows(matrix, bits, group_size)
    levels = trellis_levels(symbols, bits)[:, :200].float()
    for start in range(0, 200, width := group_size or 200):
        own, chosen = matrix[:, start : start + width], levels[:, start : start + width]
        fit = (own * chosen).sum(1) / chosen.square().sum(1)
        assert ((scales[:, start // width].float() / fit - 1).abs() <= 2**-8).all()


@each_width
def test_the_scale_of_rows_cancels(bits: int) -> None:
    """Powers of two, also those whose squares are no fp32 numbers."""
    matrix = noise(3, 96, seed=bits)
    symbols, scales = trellis_rows(matrix, bits, 32)
    for power in (-90, -3, 60):
        other, scaled = trellis_rows(matrix * 2.0**power, bits, 32)
        assert torch.equal(other, symbols)
        assert torch.equal(scaled.double(), scales.double() * 2.0**power)


@each_width
def test_zeros_stay_zeros(bits: int) -> None:
    """A whole matrix, a row, and a group between others, which keep their quality."""
    matrix = noise(4, 160, seed=bits)
    matrix[1] = 0
    matrix[2, 32:64] = 0
    found = restored(matrix, bits, 32)
    assert found[1].eq(0).all()
    assert found[2, 32:64].eq(0).all()
    assert lost(matrix[2], found[2]) < 1.3 * lost(matrix[0], found[0])
    assert restored(torch.zeros(2, 40), bits).eq(0).all()


# Relative squared errors that TRELLIS codes must keep to on gaussian rows; plain codes of the same bits lose more.
MOST = {1: 0.295, 2: 0.080, 3: 0.0215, 4: 0.0061}


@each_width
def test_gaussian_rows_lose_what_the_tables_promise(library: native.Library, bits: int) -> None:
    del library
    matrix = noise(24, 1024, seed=7)
    error = lost(matrix, restored(matrix, bits))
    assert error < MOST[bits]
    if bits > 1:
        codes, scales = quantize_rows(matrix, bits, 128)
        plain = (codes - (2**bits - 1) / 2) * expand_scales(scales, 1024, 128)
        assert error < {2: 0.70, 3: 0.62, 4: 0.62}[bits] * lost(matrix, plain)


@each_width
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("tails", ["gaussian", "laplace", "student"])
def test_predictions_are_near(library: native.Library, bits: int, group_size: int | None, tails: str) -> None:
    del library
    torch.manual_seed(bits)
    matrix = {
        "gaussian": torch.randn,
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample,
        "student": torch.distributions.StudentT(5.0).sample,
    }[tails](torch.Size((12, 1024)))
    found = float((matrix - restored(matrix, bits, group_size)).square().sum())
    assert 0.8 < found / float(predicted_errors(matrix, bits, group_size).sum()) < 1.1


@each_width
def test_the_first_scale_is_nearly_the_best(library: native.Library, bits: int) -> None:
    """Of rows with long tails, where a gaussian's scale loses much more."""
    torch.manual_seed(bits)
    matrix = torch.distributions.Laplace(0.0, 1.0).sample(torch.Size((16, 1024)))
    first = first_scales(matrix.unsqueeze(1), bits, 1024)

    def error(scales: Tensor) -> float:
        levels = native.search(library, to_fixed(matrix / scales), bits, 1024, torch.ones(16, 1))[1]
        fit = (matrix * levels).sum(1, keepdim=True) / levels.float().square().sum(1, keepdim=True)
        return lost(matrix, fit * levels)

    tried = [error(first * factor) for factor in (0.7, 0.85, 1.0, 1.15, 1.3)]
    assert tried[2] < 1.03 * min(tried)
    gaussian = matrix.square().mean(1, keepdim=True).sqrt() / PROFILES[bits].deviation
    assert tried[2] <= 1.02 * error(gaussian)


def test_tables_can_be_trained_anew(library: native.Library) -> None:
    """From the pinned start on a smaller sample: within 1 % of the format's own error."""
    del library
    bits = 2
    deviation = PROFILES[bits].deviation
    trained, unit = train_tables.train(bits, train_tables.STARTS[bits], samples=1 << 16)
    own = train_tables.error(tables(bits).double().numpy() / deviation, bits, deviation, 1 << 18)
    assert train_tables.error(trained, bits, unit, 1 << 18) < 1.01 * own


def test_without_a_compiler_torch_searches(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    x = to_fixed(45 * noise(2, 40))
    expected = search.best_symbols(x, 3)
    search._library.cache_clear()
    native.load.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler -O0")
    found = search.best_symbols(x, 3)
    search._library.cache_clear()
    native.load.cache_clear()
    assert all(map(torch.equal, found, expected))
    assert "CXX names 'no-such-compiler', which is no command" in caplog.text
