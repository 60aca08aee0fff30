"""Weight tiles for Triton kernels: center + rows (plain or in codes) + bitmap of one expert, decoded in registers.

A weight is ``[rows, columns]`` in the format's orientation (SPEC.md, 3), any sum of up to three terms. ``Tile`` holds
its pointers and strides, ``TileSpec`` what is known when a kernel is compiled. Offsets between experts are 64 bits,
those within one expert's matrix 32.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# What a ``*_bits`` of ``TileSpec`` says of values that are no codes.
PLAIN = 16
_PLAIN = tl.constexpr(PLAIN)


class Tile(NamedTuple):
    """Pointers, and elements from one expert to the next; None for terms that are not there.

    Attributes:
        center: ``[rows, columns]``, or codes uint8 ``[rows, bytes]``, with ``center_scales`` bfloat16.
        own: ``[E, rows, columns]``, or codes, with ``own_scales``.
        mask: uint8 ``[E, rows, mask bytes]``; ``words`` is the same memory as int32.
        row_ptr: int32 ``[E, rows]``; None where every row holds equally many values.
        kept_values: of every expert, or codes (Triton's own tuples have ``values``); packed where ``starts`` is
            given, int64 ``[E]``.
        value_scales: bfloat16 ``[E, rows, groups]``.
    """

    center: Tensor | None = None
    center_scales: Tensor | None = None
    own: Tensor | None = None
    own_scales: Tensor | None = None
    own_stride: int = 0
    own_scales_stride: int = 0
    mask: Tensor | None = None
    words: Tensor | None = None
    row_ptr: Tensor | None = None
    kept_values: Tensor | None = None
    starts: Tensor | None = None
    value_scales: Tensor | None = None
    mask_stride: int = 0
    row_ptr_stride: int = 0
    values_stride: int = 0
    starts_stride: int = 0
    value_scales_stride: int = 0


class TileSpec(NamedTuple):
    """Compile-time half of a ``Tile``.

    Attributes:
        center_bits: of a code, ``PLAIN`` for plain values, 0 where there is no center; groups are columns that
            share a scale, 0 for the whole row.
        own_bits: likewise.
        value_bits: likewise, of the bitmap's values.
        row_stride: from one row of a bitmap's own values to the next, in elements; 0 where ``row_ptr`` says.
    """

    center_bits: int = 0
    center_group: int = 0
    own_bits: int = 0
    own_group: int = 0
    value_bits: int = 0
    value_group: int = 0
    row_stride: int = 0


@triton.jit
def _unpack(codes, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bytes ``[ROWS, COLUMNS * BITS / 8]`` to int32 ``[ROWS, COLUMNS]``, the first code lowest."""
    shifts = tl.arange(0, 8 // BITS) * BITS
    wide = (codes.to(tl.int32)[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1)
    return tl.reshape(wide, (ROWS, COLUMNS))


@triton.jit
def _load_codes(
    start, rows, row_ok, first_column, BITS: tl.constexpr, ROW_BYTES: tl.constexpr, FROM: tl.constexpr,
    PLANE_BYTES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One plane of codes: ``PLANE_BYTES`` of each row, from byte ``FROM``; int32 ``[ROWS, COLUMNS]``."""
    places = first_column * BITS // 8 + tl.arange(0, COLUMNS * BITS // 8)
    ok = row_ok[:, None] & (places < PLANE_BYTES)[None, :]
    codes = tl.load(start + rows[:, None] * ROW_BYTES + FROM + places[None, :], mask=ok, other=0)
    return _unpack(codes, BITS, ROWS, COLUMNS)


@triton.jit
def _scaled(
    levels, scales, rows, row_ok, first_column, GROUP: tl.constexpr, NUM_COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr
):  # fmt: skip
    """``levels`` fp32 ``[ROWS, COLUMNS]`` times the scale of each group of columns, or of the row where GROUP is 0."""
    if GROUP == 0:
        scale = tl.load(scales + rows, mask=row_ok, other=0).to(tl.float32)
        scaled = levels * scale[:, None]
    else:
        SPAN: tl.constexpr = GROUP if GROUP < COLUMNS else COLUMNS
        GROUPS: tl.constexpr = (NUM_COLUMNS + GROUP - 1) // GROUP
        group = (first_column + tl.arange(0, COLUMNS // SPAN) * SPAN) // GROUP
        ok = row_ok[:, None] & (group < GROUPS)[None, :]
        scale = tl.load(scales + rows[:, None] * GROUPS + group[None, :], mask=ok, other=0).to(tl.float32)
        wide = tl.reshape(levels, (ROWS, COLUMNS // SPAN, SPAN)) * scale[:, :, None]
        scaled = tl.reshape(wide, (ROWS, COLUMNS))
    return scaled


@triton.jit
def _rows_tile(
    start, scales, rows, row_ok, first_column, BITS: tl.constexpr, GROUP: tl.constexpr, NUM_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """``[ROWS, COLUMNS]``, plain values in their dtype, codes in fp32. Rows that are not there are 0."""
    if BITS == _PLAIN:
        columns = first_column + tl.arange(0, COLUMNS)
        ok = row_ok[:, None] & (columns < NUM_COLUMNS)[None, :]
        tile = tl.load(start + rows[:, None] * NUM_COLUMNS + columns[None, :], mask=ok, other=0)
    else:
        OCTETS: tl.constexpr = (NUM_COLUMNS + 7) // 8
        ROW_BYTES: tl.constexpr = BITS * OCTETS
        if BITS == 3:
            codes = _load_codes(start, rows, row_ok, first_column, 2, ROW_BYTES, 0, 2 * OCTETS, ROWS, COLUMNS)
            high = _load_codes(start, rows, row_ok, first_column, 1, ROW_BYTES, 2 * OCTETS, OCTETS, ROWS, COLUMNS)
            codes = codes | (high << 2)
        else:
            codes = _load_codes(start, rows, row_ok, first_column, BITS, ROW_BYTES, 0, ROW_BYTES, ROWS, COLUMNS)
        levels = codes.to(tl.float32) - ((1 << BITS) - 1) / 2
        tile = _scaled(levels, scales, rows, row_ok, first_column, GROUP, NUM_COLUMNS, ROWS, COLUMNS)
    return tile


@triton.jit
def _bitmap_tile(
    t, s: tl.constexpr, expert, rows, row_ok, first_column, before, NUM_COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr
):  # fmt: skip
    """``[ROWS, COLUMNS]`` and the rows' kept values up to the tile's end, int32 ``[ROWS]``.

    A value lies at the row's first value + ``before`` + the kept ones of the bytes to the left in the tile + those
    below its bit in its own byte. The last are counted for all eight bits at once, in the nibbles of 32 bits.
    """
    BYTES: tl.constexpr = COLUMNS // 8
    ROW_BYTES: tl.constexpr = (NUM_COLUMNS + 63) // 64 * 8
    places = first_column // 8 + tl.arange(0, BYTES)
    ok = row_ok[:, None] & (places < ROW_BYTES)[None, :]
    mask = t.mask + expert * t.mask_stride
    octets = tl.load(mask + rows[:, None] * ROW_BYTES + places[None, :], mask=ok, other=0).to(tl.uint32)
    spread = (octets | (octets << 12)) & 0x000F000F
    spread = (spread | (spread << 6)) & 0x03030303
    spread = (spread | (spread << 3)) & 0x11111111  # bit j in nibble j
    counts = spread + (spread << 4)
    counts = counts + (counts << 8)
    counts = counts + (counts << 16)  # nibble j: kept among bits 0..j, at most 8
    kept = (counts >> 28).to(tl.int32)
    left = before[:, None] + tl.cumsum(kept, 1) - kept
    nibbles = (tl.arange(0, 8) * 4).to(tl.uint32)
    bits = (spread[:, :, None] >> nibbles[None, None, :]) & 1
    ranks = ((counts[:, :, None] >> nibbles[None, None, :]) & 15) - bits
    position = tl.reshape(left[:, :, None] + ranks.to(tl.int32), (ROWS, COLUMNS))
    keep = tl.reshape(bits, (ROWS, COLUMNS)) != 0
    if s.row_stride == 0:
        first = tl.load(t.row_ptr + expert * t.row_ptr_stride + rows, mask=row_ok, other=0)
    else:
        first = rows * s.row_stride
    values = t.kept_values + expert * t.values_stride
    if t.starts is not None:
        values += tl.load(t.starts + expert * t.starts_stride)
    if s.value_bits == _PLAIN:
        tile = tl.load(values + first[:, None] + position, mask=keep, other=0)
    else:
        PER: tl.constexpr = 8 // s.value_bits
        if s.row_stride == 0:
            position += first[:, None]
            packed = tl.load(values + position // PER, mask=keep, other=0).to(tl.int32)
        else:
            packed = tl.load(values + first[:, None] + position // PER, mask=keep, other=0).to(tl.int32)
        codes = (packed >> (position % PER * s.value_bits)) & ((1 << s.value_bits) - 1)
        levels = tl.where(keep, codes.to(tl.float32) - ((1 << s.value_bits) - 1) / 2, 0.0)
        scales = t.value_scales + expert * t.value_scales_stride
        tile = _scaled(levels, scales, rows, row_ok, first_column, s.value_group, NUM_COLUMNS, ROWS, COLUMNS)
    return tile, before + tl.sum(kept, 1)


@triton.jit
def kept_before(t, expert, rows, row_ok, first_column, NUM_COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Kept values of each row left of ``first_column``, a multiple of 32; int32 ``[ROWS]``."""
    ROW_WORDS: tl.constexpr = (NUM_COLUMNS + 63) // 64 * 2
    STEP: tl.constexpr = 8
    row = t.words + expert * (t.mask_stride // 4) + rows[:, None] * ROW_WORDS
    total = tl.zeros((ROWS,), tl.int32)
    words = first_column // 32
    for begin in range(0, words, STEP):
        places = begin + tl.arange(0, STEP)
        ok = row_ok[:, None] & (places < words)[None, :]
        v = tl.load(row + places[None, :], mask=ok, other=0).to(tl.uint32, bitcast=True)
        v = (v & 0x55555555) + ((v >> 1) & 0x55555555)
        v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
        v = (v & 0x0F0F0F0F) + ((v >> 4) & 0x0F0F0F0F)
        v = v + (v >> 8)
        total += tl.sum(((v + (v >> 16)) & 63).to(tl.int32), 1)
    return total


@triton.jit
def load_tile(
    t, s: tl.constexpr, expert, rows, first_column, before, NUM_ROWS: tl.constexpr, NUM_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """The sum of a weight's terms for one expert.

    Args:
        t: a ``Tile``.
        s: its ``TileSpec``; at least one term.
        expert: int64, row of the parameters.
        rows: int32 ``[ROWS]``; those from ``NUM_ROWS`` on give 0.
        first_column: a multiple of COLUMNS, which is a power of two, at least 8.
        before: kept values of each row left of the tile, int32 ``[ROWS]``; only bitmaps use it.
        DOT: dtype of the result. Terms are added in fp32.
    Returns:
        ``[ROWS, COLUMNS]``, finite where no column is there; ``before`` of the next tile.
    """
    row_ok = rows < NUM_ROWS
    after = before
    if s.center_bits > 0:
        tile = _rows_tile(
            t.center, t.center_scales, rows, row_ok, first_column, s.center_bits, s.center_group, NUM_COLUMNS, ROWS,
            COLUMNS
        )  # fmt: skip
    if s.own_bits > 0:
        scales = t.own_scales
        if s.own_bits != _PLAIN:
            scales += expert * t.own_scales_stride
        own = _rows_tile(
            t.own + expert * t.own_stride, scales, rows, row_ok, first_column, s.own_bits, s.own_group, NUM_COLUMNS,
            ROWS, COLUMNS
        )  # fmt: skip
        if s.center_bits > 0:
            tile = tile.to(tl.float32) + own.to(tl.float32)
        else:
            tile = own
    if s.value_bits > 0:
        pruned, after = _bitmap_tile(
            t, s, expert, rows, row_ok, first_column, before, NUM_COLUMNS, ROWS, COLUMNS
        )  # fmt: skip
        if s.center_bits + s.own_bits > 0:
            tile = tile.to(tl.float32) + pruned.to(tl.float32)
        else:
            tile = pruned
    return tile.to(DOT), after
