"""What the symbols of trellis codes mean: a level from a column's symbol and those before it (SPEC.md, 4).

The state of a column is the last ``STATE_BITS`` bits of its row's symbols, its own lowest. Rows bite their tails:
before the first column lie the last ones, those that fill up the row's last octet included. A level is a sum of table
entries, one for each field of the state, so that decoding is a few byte shuffles.
Bit-shift trellises: Tseng et al., QTIP, arXiv 2406.11235; trellis-coded quantisation: Marcellin and Fischer, 1990.
"""

from functools import cache
from math import ceil

import torch
from torch import Tensor

from compress_tools.format.packing import unpack_codes
from compress_tools.format.quantization import expand_scales
from compress_tools.format.trellis_tables import TABLES

STATE_BITS = 12
STATES = 1 << STATE_BITS


def field_bits(bits: int) -> int:
    """Bits of the state that choose an entry of one table: 3 for symbols of 3 bits, else 4."""
    return 3 if bits == 3 else 4


def tables(bits: int) -> Tensor:
    """int8 ``[STATE_BITS / field_bits, 2**field_bits]``: the table of the lowest field, the newest symbols', first."""
    return torch.tensor(TABLES[bits], dtype=torch.int8)


@cache
def state_levels(bits: int) -> Tensor:
    """The level of every state: int8 ``[STATES]``, within -127 and 127."""
    width = field_bits(bits)
    states = torch.arange(STATES)
    fields = [table.int()[states >> width * number & (1 << width) - 1] for number, table in enumerate(tables(bits))]
    return torch.stack(fields).sum(0).to(torch.int8)


def trellis_levels(symbols: Tensor, bits: int) -> Tensor:
    """Levels in units of the scale: symbols of whole rows, uint8 ``[..., N]``, to int8 ``[..., N]``."""
    states = symbols.int()
    for age in range(1, STATE_BITS // bits):
        states |= symbols.roll(age, -1).int() << bits * age
    return state_levels(bits).to(symbols.device)[states]


def decode_trellis(packed: Tensor, scales: Tensor, bits: int, columns: int, group_size: int | None) -> Tensor:
    """Rows of trellis codes and scales to values.

    Args:
        packed: uint8 ``[..., I, code_row_bytes(bits, columns)]``.
        scales: ``[..., I, num_groups(columns, group_size)]``.
        bits: 1, 2, 3 or 4.
        columns: columns of a row.
        group_size: columns that share a scale; None for the whole row.
    Returns:
        fp32 ``[..., I, columns]``.
    """
    levels = trellis_levels(unpack_codes(packed, bits, 8 * ceil(columns / 8)), bits)[..., :columns]
    return levels.float() * expand_scales(scales, columns, group_size)
