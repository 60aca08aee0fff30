"""Refitting of scales: the least-squares fit to their own levels."""

import pytest
import torch

from compress_tools.format.quantization import half_range
from compress_tools.residuals.quantizer import quantize_rows


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_are_the_least_squares_fit_to_their_levels(bits: int) -> None:
    """It has come to rest, but for bfloat16's rounding, in nearly every row."""
    values = torch.randn(200, 64, generator=torch.Generator().manual_seed(bits))
    codes, scales = quantize_rows(values, bits)
    levels = codes.float() - half_range(bits)
    fit = (values * levels).sum(1) / levels.square().sum(1)
    off = (scales[:, 0].float() / fit - 1).abs()
    assert off.median() < 2**-8
    assert (off < 0.02).float().mean() > 0.9
