"""Every weight as a symbol of a trellis code (SPEC.md, 4): residuals, and centers by the same encoder.

For each group of columns a scale is predicted at which least is lost (``first_scales``), symbols are searched for
exactly, the scale is fitted to their levels by least squares, and both once more.
"""

import numpy as np
import torch
from torch import Tensor

from compress_tools.config import CompressionConfig
from compress_tools.format.dtypes import DTYPES
from compress_tools.format.packing import pack_codes
from compress_tools.format.parts.base import SCALE_DTYPE, Projection, StoredTensors
from compress_tools.format.parts.trellis import TrellisCenter, TrellisResidual
from compress_tools.format.quantization import expand_scales
from compress_tools.format.row_sizes import num_groups
from compress_tools.format.trellis import trellis_levels
from compress_tools.importance import Importance
from compress_tools.residuals.quantizer import grouped, rounded_scales
from compress_tools.residuals.trellis_profiles import PROFILES, Profile
from compress_tools.residuals.viterbi.plain_torch import to_fixed
from compress_tools.residuals.viterbi.search import best_symbols
from compress_tools.source.design_matrix import design_to_rows

PASSES = 2
# Scales that are predicted for, as multiples of a gaussian's: rows with longer tails want more.
STRETCHES = (0.95, 1.0, 1.05, 1.1, 1.2, 1.3, 1.45, 1.6, 1.8, 2.1, 2.5)
# A column's errors count at most so many times more, or less, than the median's: costs stay whole numbers of 32 bits.
MOST_COUNTED = 32.0
# Values coded at a time, so that what a row needs stays in the caches.
CHUNK_VALUES = {"cpu": 1 << 19, "cuda": 1 << 25}


def trellis_parts(
    config: CompressionConfig, projections: tuple[Projection, ...], _rows: int, _columns: int
) -> tuple[TrellisResidual, ...]:
    """See ``Recipe``."""
    return (TrellisResidual(projections=projections, bits=config.trellis_bits, group_size=config.group_size or None),)


def encode_trellis(
    rows: Tensor,
    part: TrellisResidual | TrellisCenter,
    _dtype: torch.dtype,
    _seed: int,
    importance: Importance | None = None,
) -> StoredTensors:
    """See ``Encoder``."""
    stored: StoredTensors = {}
    for projection, own in design_to_rows(rows, part.projections).items():
        counts = None if importance is None else importance.columns.get(projection)
        symbols, scales = trellis_rows(own, part.bits, part.group_size, counts)
        stored[projection, part.stored_as.codes] = pack_codes(symbols, part.bits).cpu()
        stored[projection, part.stored_as.scales] = scales.cpu()
    return stored


def trellis_rows(
    matrix: Tensor, bits: int, group_size: int | None = None, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Symbols and scales of rows.

    Args:
        matrix: ``[I, C]`` fp32, finite.
        bits: 1, 2, 3 or 4.
        group_size: columns that share a scale; None for the whole row.
        counts: fp32 ``[C]``: what errors of each column count; None where all count alike.
    Returns:
        symbols uint8 ``[I, C]``, C rounded up to a multiple of 8, not packed, and scales bfloat16
        ``[I, num_groups(C, group_size)]``, on the matrix's device. A group of zeros has
        scale 0, which restores zeros whatever the symbols.
    """
    rows, columns = matrix.shape
    symbols = torch.empty(rows, columns + -columns % 8, dtype=torch.uint8, device=matrix.device)
    scales = torch.empty(rows, num_groups(columns, group_size), dtype=DTYPES[SCALE_DTYPE], device=matrix.device)
    bounded = _bounded(counts, matrix.device)
    for start in range(0, rows, step := max(1, CHUNK_VALUES[matrix.device.type] // columns)):
        chunk = slice(start, start + step)
        symbols[chunk], scales[chunk] = _code(matrix[chunk], bits, group_size, bounded)
    return symbols, scales


def restored_rows(symbols: Tensor, scales: Tensor, bits: int, columns: int, group_size: int | None) -> Tensor:
    """What ``trellis_rows`` makes, restored: fp32 ``[I, C]``."""
    return trellis_levels(symbols, bits)[:, :columns] * expand_scales(scales, columns, group_size)


def _bounded(counts: Tensor | None, device: torch.device) -> Tensor | None:
    """What columns count, in units of the median, and not more than ``MOST_COUNTED`` times more or less."""
    if counts is None:
        return None
    relative = counts / counts.median().clamp_min(torch.finfo(torch.float32).tiny)
    return relative.clamp(1 / MOST_COUNTED, MOST_COUNTED).to(device)


def _code(matrix: Tensor, bits: int, group_size: int | None, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    columns = matrix.shape[1]
    values = grouped(matrix, group_size)
    peak = values.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    # Squares of tiny residuals would underflow.
    relative = values / peak.unsqueeze(-1)
    weights = None if counts is None else grouped(counts[None], group_size)  # [1, G, width]
    share = first_scales(relative, bits, columns, weights)
    for _ in range(PASSES):
        divisor = rounded_scales(share * peak).float()
        # What a group of zeros restores does not depend on its symbols: they are chosen for the groups beside it.
        least = divisor.masked_fill(divisor == 0, torch.inf).amin(-1, keepdim=True) / 8
        divisor = torch.where(divisor == 0, least.masked_fill(least.isinf(), 1), divisor)
        x = to_fixed((values / divisor.unsqueeze(-1)).flatten(1)[:, :columns])
        # What fills up the last octet is coded as zeros: it lies before the first column.
        filled = torch.nn.functional.pad(x, (0, -columns % 8))
        if weights is None or counts is None:
            ratios = (divisor.roll(1, 1) / divisor).square()
            symbols, levels = best_symbols(filled, bits, group_size, ratios)
        else:
            # A unit of squared error in each column; what fills up the last octet counts next to nothing.
            units = (divisor.square().unsqueeze(-1) * weights).flatten(1)[:, :columns]
            units = torch.cat([units, units[:, -1:].expand(-1, -columns % 8) / MOST_COUNTED], 1)
            symbols, levels = best_symbols(filled, bits, 0, units.roll(1, 1) / units)
        own = grouped(levels[:, :columns].float(), group_size)
        # closed form: the scale at least squared error for given levels, which may be 0
        if weights is None:
            share = ((relative * own).sum(-1) / own.square().sum(-1).clamp_min(1)).clamp_min(0)
        else:
            counted = own * weights
            share = ((relative * counted).sum(-1) / (own * counted).sum(-1).clamp_min(1 / MOST_COUNTED)).clamp_min(0)
    return symbols, rounded_scales(share * peak)


def first_scales(groups: Tensor, bits: int, columns: int, weights: Tensor | None = None) -> Tensor:
    """The scale of each group at which least will be lost, by what gaussian rows with a few other values lost.

    Args:
        groups: ``[I, G, width]`` fp32, zeros behind the last column.
        bits: 1, 2, 3 or 4.
        columns: C.
        weights: fp32 ``[1, G, width]``: what errors count, 0 behind the last column; None where all count alike.
    Returns:
        fp32 ``[I, G]``.
    """
    return _predict(groups, bits, columns, weights)[0]


def predicted_errors(matrix: Tensor, bits: int, group_size: int | None = None, counts: Tensor | None = None) -> Tensor:
    """Squared error that ``trellis_rows`` will make, without a search, or up to a fifth more: fp32 ``[I]``.

    Where columns count differently, each entry's times that; what the search then gains by it is not foreseen.

    Args:
        matrix: ``[I, C]`` fp32.
        bits: 1, 2, 3 or 4.
        group_size: columns that share a scale; None for the whole row.
        counts: fp32 ``[C]``: what errors of each column count; None where all count alike.
    """
    weights = None if counts is None else grouped(counts.to(matrix.device)[None], group_size)
    return _predict(grouped(matrix, group_size), bits, matrix.shape[1], weights)[1].sum(-1)


def _predict(groups: Tensor, bits: int, columns: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    profile = PROFILES[bits]
    width = groups.shape[-1]
    if weights is None:
        counts = torch.full(groups.shape[:2], float(width), device=groups.device)
        counts[:, -1] = columns - width * (groups.shape[1] - 1)
        sizes = (groups.square().sum(-1) / counts).sqrt() / profile.deviation
    else:
        counts = weights.sum(-1).expand(groups.shape[:2])
        sizes = ((groups.square() * weights).sum(-1) / counts).sqrt() / profile.deviation
    magnitudes = groups.abs()
    best = error = torch.zeros_like(sizes)
    for number, stretch in enumerate(STRETCHES):
        scales = sizes * stretch
        lost = _lost(magnitudes / scales.masked_fill(scales == 0, 1).unsqueeze(-1), profile)
        if weights is None:
            # zeros behind the last column are not there
            lost = lost.sum(-1) - (width - counts) * profile.by_magnitude[0]
        else:
            lost = (lost * weights).sum(-1)
        found = (lost + counts * _correction(profile, 1 / stretch)) * scales.square()
        better = found < error if number else torch.ones_like(found, dtype=torch.bool)
        best, error = torch.where(better, scales, best), torch.where(better, found, error)
    return best, error


def _lost(levels: Tensor, profile: Profile) -> Tensor:
    """Squared error, in squared levels, of values of a magnitude, what their neighbours lose by them included."""
    table = torch.tensor(profile.by_magnitude, dtype=torch.float32, device=levels.device)
    position = (levels / profile.step - 0.5).clamp_(0, len(table) - 1.001)
    index = position.long()
    inside = torch.lerp(table[index], table[index + 1], position - index)
    end = profile.step * (len(table) - 0.5)
    beyond = (levels - end + float(table[-1]) ** 0.5).square()
    return torch.where(levels > end, beyond, inside)


def _correction(profile: Profile, deviation: float) -> float:
    """What a value loses more in a row that fills less of the levels than the profile's own."""
    return float(np.interp(deviation, profile.deviations, profile.corrections))
