"""The PTX that decodes plain codes, run line by line by a few rules, gives levels and rounds them as it should."""

import pytest
import torch
from torch import Tensor

from resmoe_vllm.kernels.gpu.plain_codes import octet_program
from tests.resmoe_vllm.kernels.ptx import run_octets

BITS = [1, 2, 3, 4, 8]


def _octets(bits: int) -> tuple[list[Tensor], Tensor]:
    """Words as kernels load them, every code in every column; their levels ``[N, 8]``."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (4096, 8), generator=generator)
    for column in range(8):
        codes[: 1 << bits, column] = torch.arange(1 << bits)
    places = torch.arange(8)
    if bits == 3:
        words = ((codes & 3) << 2 * places | codes >> 2 << 16 + places).sum(1)
    else:
        words = (codes[:, :4] << bits * places[:4]).sum(1)
        if bits < 8:
            words = (codes << bits * places).sum(1)
    upper = (codes[:, 4:] << 8 * places[:4]).sum(1) if bits == 8 else words
    return [words, upper], codes.double() - ((1 << bits) - 1) / 2


@pytest.mark.parametrize("bits", BITS)
def test_program_gives_the_level_of_every_code_in_every_column(bits: int) -> None:
    inputs, levels = _octets(bits)
    assert torch.equal(run_octets(octet_program(bits, scaled=False), inputs), levels)


@pytest.mark.parametrize("bits", BITS)
def test_program_rounds_a_level_times_its_scale_once(bits: int) -> None:
    inputs, levels = _octets(bits)
    scales = torch.randn(len(levels), generator=torch.Generator().manual_seed(9)).bfloat16()
    halves = scales.view(torch.int16).long()
    found = run_octets(octet_program(bits, scaled=True), [*inputs, halves])
    assert torch.equal(found, (levels * scales.double()[:, None]).float().bfloat16().double())


@pytest.mark.parametrize("bits", [2, 4])
def test_program_does_not_mind_the_sign_of_codes(bits: int) -> None:
    """Integers of 16 bits come with their sign in the upper half."""
    inputs, levels = _octets(bits)
    own = 8 * bits
    signed = [words - (words >> own - 1 << own) for words in inputs]
    assert min(int(words.min()) for words in signed) < 0
    assert torch.equal(run_octets(octet_program(bits, scaled=False), signed), levels)
