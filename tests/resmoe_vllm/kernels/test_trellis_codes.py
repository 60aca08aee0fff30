"""The PTX that decodes trellis codes, run line by line by a few rules, gives levels and rounds them as it should."""

import pytest
import torch
from torch import Tensor

from compress_tools.format.trellis import STATE_BITS, STATES, state_levels
from resmoe_vllm.kernels.gpu.trellis_codes import LEVEL_UNIT, held_program, octet_program, raised_tables
from tests.resmoe_vllm.kernels.ptx import run_octets, run_ptx


def _columns(bits: int, inputs: list[Tensor], scales: Tensor | None = None) -> Tensor:
    """The eight columns of each octet, fp64 ``[N, 8]``."""
    count = len(inputs[0])
    held = run_ptx(held_program(bits), {"%tid.x": torch.arange(count)})
    assert all(len(held[f"${number}"].unique()) == 1 for number in range(6))
    halves = torch.zeros(count, dtype=torch.int64) if scales is None else scales.view(torch.int16).long() & 0xFFFF
    given = [*inputs, halves | halves << 16, *(held[f"${number}"] for number in range(6))]
    program = octet_program(bits, scaled=scales is not None)
    return run_octets(program, given)


def _packed(symbols: Tensor, bits: int) -> Tensor:
    """Octets ``[N, 8]`` as kernels load them."""
    places = torch.arange(symbols.shape[1])
    if bits == 3:
        return ((symbols & 3) << 2 * places | symbols >> 2 << 16 + places).sum(1)
    return (symbols << bits * places).sum(1)


def _octets(bits: int) -> tuple[list[Tensor], Tensor]:
    """Codes with what is before them, every state in every column; their levels ``[N, 8]``."""
    generator = torch.Generator().manual_seed(bits)
    before = 16 if bits == 1 else 8
    count = STATE_BITS // bits
    symbols = torch.randint(0, 1 << bits, (8, STATES, before + 8), generator=generator)
    states = torch.zeros(8, STATES, 8, dtype=torch.int64)
    for column in range(8):
        for age in range(count):
            symbols[column, :, before + column - age] = torch.arange(STATES) >> bits * age & (1 << bits) - 1
    for age in range(count):
        states |= symbols[..., before - age : before - age + 8] << bits * age
    symbols = symbols.flatten(0, 1)
    inputs = [_packed(symbols[:, before:], bits), _packed(symbols[:, :before], bits)]
    return inputs, state_levels(bits)[states.flatten(0, 1)].double()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_program_gives_the_level_of_every_state_in_every_column(bits: int) -> None:
    inputs, levels = _octets(bits)
    assert torch.equal(_columns(bits, inputs), levels * LEVEL_UNIT)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_program_rounds_a_level_times_its_scale_once(bits: int) -> None:
    inputs, levels = _octets(bits)
    scales = torch.randn(len(levels), generator=torch.Generator().manual_seed(9)).bfloat16()
    found = _columns(bits, inputs, scales / LEVEL_UNIT)
    assert torch.equal(found, (levels * scales.double()[:, None]).float().bfloat16().double())


@pytest.mark.parametrize("bits", [2, 4])
def test_program_does_not_mind_the_sign_of_codes(bits: int) -> None:
    """Integers of 16 bits come with their sign in the upper half."""
    inputs, levels = _octets(bits)
    own = 8 * bits
    signed = [codes - (codes >> own - 1 << own) for codes in inputs]
    assert min(int(codes.min()) for codes in signed) < 0
    assert torch.equal(_columns(bits, signed), levels * LEVEL_UNIT)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_entries_have_no_sign_and_their_sums_are_bytes(bits: int) -> None:
    tables = raised_tables(bits)
    assert min(min(table) for table in tables) >= 0
    assert max(max(table) for table in tables) <= 127
    assert sum(max(table) for table in tables) <= 255
