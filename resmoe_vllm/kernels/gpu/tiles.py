"""Weight tiles for Triton kernels: center + rows (plain or in codes) + bitmap of one expert, decoded in registers.

A weight is ``[rows, columns]`` in the format's orientation (SPEC.md, 3), any sum of up to three terms. ``Tile`` holds
its pointers and strides, ``TileSpec`` what is known when a kernel is compiled. Offsets between experts are 64 bits,
those within one expert's matrix 32.

Codes and bitmaps are decoded by octets: eight neighbouring columns in the registers of one lane, where the matrix
units, or wide stores to shared memory, take them as they are.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import current_target
from triton.runtime.jit import constexpr_function

from compress_tools.format.packing import mask_row_counts
from compress_tools.format.trellis import STATE_BITS, STATES, state_levels
from resmoe_vllm.kernels.gpu.plain_codes import plain_columns
from resmoe_vllm.kernels.gpu.ptx import runs_ptx
from resmoe_vllm.kernels.gpu.trellis_codes import LEVEL_UNIT, octet_columns

# What a ``*_bits`` of ``TileSpec`` says of values that are no codes.
PLAIN = 16
_PLAIN = tl.constexpr(PLAIN)
_LEVELS = tl.constexpr(1 / LEVEL_UNIT)
# Columns of a bitmap for which there is one pointer; ``kept_before`` has it, too.
POINTER_COLUMNS = 64


class Tile(NamedTuple):
    """Pointers, and elements from one expert to the next; None for terms that are not there.

    Attributes:
        center: ``[rows, columns]``, or codes uint8 ``[rows, bytes]``, with ``center_scales`` bfloat16; of trellis codes
            with ``center_levels``, ``window_levels``.
        own: ``[E, rows, columns]``, or codes, with ``own_scales`` and ``own_levels``.
        mask: uint8 ``[E, rows, mask bytes]``.
        pointers: int16 or int32 ``[E, rows, ceil(columns / 64)]``: a row's kept values left of each 64 columns; only
            where blocks of columns are read by themselves.
        row_ptr: int32 ``[E, rows]``; None where every row holds equally many values, ``row_stride``.
        kept_values: of every expert, or codes (Triton's own tuples have ``values``); packed where ``starts`` is
            given, int64 ``[E]``.
        value_scales: bfloat16 ``[E, rows, groups]``.
    """

    center: Tensor | None = None
    center_scales: Tensor | None = None
    center_levels: Tensor | None = None
    own: Tensor | None = None
    own_scales: Tensor | None = None
    own_levels: Tensor | None = None
    own_stride: int = 0
    own_scales_stride: int = 0
    mask: Tensor | None = None
    pointers: Tensor | None = None
    row_ptr: Tensor | None = None
    kept_values: Tensor | None = None
    starts: Tensor | None = None
    value_scales: Tensor | None = None
    row_stride: int = 0
    mask_stride: int = 0
    pointers_stride: int = 0
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
        own_by_group: scales lie ``[E, groups, rows]``, as a product over rows reads them.
        value_bits: likewise, of the bitmap's values.
        by_row: a bitmap's rows hold ``row_stride`` values each; else ``row_ptr`` says where one begins.
    """

    center_bits: int = 0
    center_group: int = 0
    own_bits: int = 0
    own_group: int = 0
    own_by_group: bool = False
    value_bits: int = 0
    value_group: int = 0
    by_row: bool = False


def column_pointers(mask: Tensor) -> Tensor:
    """``Tile.pointers`` of a mask ``[E, rows, mask bytes]``, whose rows end with whole pointers' columns."""
    places = mask.shape[2] // (POINTER_COLUMNS // 8)
    dtype = torch.int16 if places * POINTER_COLUMNS < 2**15 else torch.int32
    pointers = torch.empty(*mask.shape[:2], places, dtype=dtype, device=mask.device)
    for own, of in zip(pointers, mask, strict=True):
        counts = mask_row_counts(of.unflatten(1, (-1, POINTER_COLUMNS // 8)))
        own.copy_(counts.cumsum(1) - counts)
    return pointers


def octets_view(codes: Tensor, bits: int) -> Tensor:
    """``codes`` uint8 ``[..., bytes]`` with one integer for each octet, as kernels load them; of 1 and 3 bits bytes."""
    return codes if bits in (1, 3) else codes.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[bits])


@cache
def window_levels(bits: int, device: torch.device) -> Tensor:
    """Levels of trellis codes by the last 12 bits of symbols as they lie in a row, the oldest lowest: int8 ``[4096]``.

    With 3 bits, which lie in two planes, the low two bits of four symbols come first, then their high bits.
    """
    windows, states = torch.arange(STATES), torch.zeros(STATES, dtype=torch.int64)
    count = STATE_BITS // bits
    for age in range(count):
        place = count - 1 - age
        if bits == 3:
            symbol = windows >> 2 * place & 3 | (windows >> 2 * count + place & 1) << 2
        else:
            symbol = windows >> bits * place & (1 << bits) - 1
        states |= symbol << bits * age
    return state_levels(bits)[states].to(device)


@triton.jit
def _load_lanes(start, offsets, ok):
    """One element a lane, lanes side by side along the columns: ``[ROWS, OCTETS]``, 0 where not ok.

    Two hints see to that: neighbours along the columns (``max_contiguous``), no alignment (``multiple_of`` 1). Without
    them Triton 3.6 lays lanes down the rows and moves every decoded column through shared memory by itself.
    """
    pointers = tl.multiple_of(tl.max_contiguous(start + offsets, [1, 2]), [1, 1])
    return tl.load(pointers, mask=ok, other=0)


@triton.jit
def _by_octet(c0, c1, c2, c3, c4, c5, c6, c7, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Eight ``[ROWS, COLUMNS / 8]``, the columns of each octet, to ``[ROWS, COLUMNS]``; stays in a lane's registers."""
    even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
    odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
    return tl.reshape(tl.join(even, odd), (ROWS, COLUMNS))


@triton.jit
def lane_columns(COLUMNS: tl.constexpr):
    """Where the columns of a tile in lanes' order lie, int32 ``[COLUMNS]``.

    Four lanes side by side have equally many neighbouring octets each. Of each lane's first octet come the first four
    columns, lane by lane, then the last four, then those of its second octet.
    """
    columns = tl.arange(0, COLUMNS)
    octet = columns // 32
    places = ((columns >> 2) & 3) * (COLUMNS // 4) + octet * 8 + ((columns >> 4) & 1) * 4 + (columns & 3)
    return tl.max_contiguous(tl.multiple_of(places, 4), 4)


@triton.jit
def _by_lane(c0, c1, c2, c3, c4, c5, c6, c7, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """As ``_by_octet``, in the order of ``lane_columns``: so four lanes hold it as the matrix units take it."""
    first = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (ROWS, 4, COLUMNS // 32, 4))
    last = tl.reshape(tl.join(tl.join(c4, c6), tl.join(c5, c7)), (ROWS, 4, COLUMNS // 32, 4))
    return tl.reshape(tl.permute(tl.join(first, last), (0, 2, 4, 1, 3)), (ROWS, COLUMNS))


@triton.jit
def _opaque(tile):
    """The same; the compiler, which chooses layouts by how a tile was made, does not look behind it."""
    if runs_ptx() and tile.dtype == tl.bfloat16:
        tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], tl.bfloat16, is_pure=False, pack=2)
    return tile


@triton.jit
def _in_order(c0, c1, c2, c3, c4, c5, c6, c7, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    if LANES:
        tile = _by_lane(c0, c1, c2, c3, c4, c5, c6, c7, ROWS, COLUMNS)
    else:
        tile = _opaque(_by_octet(c0, c1, c2, c3, c4, c5, c6, c7, ROWS, COLUMNS))
    return tile


@triton.jit
def _scaled_in_order(
    c0, c1, c2, c3, c4, c5, c6, c7, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Levels times their scales, fp32."""
    return _in_order(
        c0.to(tl.float32) * scale, c1.to(tl.float32) * scale, c2.to(tl.float32) * scale, c3.to(tl.float32) * scale,
        c4.to(tl.float32) * scale, c5.to(tl.float32) * scale, c6.to(tl.float32) * scale, c7.to(tl.float32) * scale,
        ROWS, COLUMNS, LANES
    )  # fmt: skip


@triton.jit
def _there(row_ok, column_ok, EVEN: tl.constexpr):
    """Which elements of a tile are there; all of them with EVEN, which the compiler then need not ask."""
    if EVEN:
        ok = tl.full((row_ok.shape[0], column_ok.shape[0]), True, tl.int1)
    else:
        ok = row_ok[:, None] & column_ok[None, :]
    return ok


@constexpr_function
def codes_in_lanes(spec, columns):
    """Whether a tile is codes alone, so that its columns may come in the order of ``lane_columns``: not on AMD."""
    if spec is None:
        return True
    target = current_target()
    if target is not None and target.backend == "hip":
        return False
    return columns % 32 == 0 and spec.value_bits == 0 and {spec.center_bits, spec.own_bits} <= {0, 1, 2, 3, 4, 8}


@triton.jit
def _load_octets(
    start, rows, row_ok, first_column, BACK: tl.constexpr, BITS: tl.constexpr, num_columns,
    OCTETS: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr = 1
):  # fmt: skip
    """The codes of each octet in one integer, ``[ROWS, OCTETS]``; with 3 bits the upper plane from bit 16 on.

    With WIDE a lane loads that many neighbours at once.

    With ``BACK`` those of that many octets before; before the first lies the last one. Zeros behind the row.
    """
    row = (num_columns + 7) // 8
    places = first_column // 8 + tl.arange(0, OCTETS)
    ok = _there(row_ok, places < row, EVEN)
    for _ in tl.static_range(BACK):
        places = tl.where(places > 0, places, row) - 1
    if BITS == 3:
        low = rows[:, None] * (3 * row) + 2 * places[None, :]
        high = rows[:, None] * (3 * row) + 2 * row + places[None, :]
        words = _load_lanes(start, low, ok).to(tl.int32)
        words |= _load_lanes(start, low + 1, ok).to(tl.int32) << 8
        words |= _load_lanes(start, high, ok).to(tl.int32) << 16
    elif WIDE > 1:
        # as EVEN has it, rows and steps begin at whole loads
        offsets = rows[:, None] * row + places[None, :]
        words = tl.load(tl.multiple_of(tl.max_contiguous(start + offsets, [1, WIDE]), [1, WIDE]))
    else:
        words = _load_lanes(start, rows[:, None] * row + places[None, :], ok)
    return words


@triton.jit
def _decoded(words, scale, shift, COLUMN: tl.constexpr, BITS: tl.constexpr):
    """Column ``COLUMN`` of each octet of codes: fp32, and exact: a product has 16 bits, its sum with ``shift`` 17."""
    if BITS == 3:
        code = ((words >> (2 * COLUMN)) & 3) | (((words >> (16 + COLUMN)) & 1) << 2)
    else:
        code = (words >> (BITS * COLUMN)) & ((1 << BITS) - 1)
    return code.to(tl.int32).to(tl.float32) * scale + shift


@triton.jit
def _level(words, before, levels, scale, COLUMN: tl.constexpr, BITS: tl.constexpr):
    """Column ``COLUMN`` of each octet of trellis codes, fp32; ``before``: the octets before, with 1 bit two of them."""
    if BITS == 3:
        low = (before & 0xFFFF) | ((words & 0xFFFF) << 16)
        high = (before >> 16) | ((words >> 16) << 8)
        window = ((low >> (10 + 2 * COLUMN)) & 0xFF) | (((high >> (5 + COLUMN)) & 15) << 8)
    elif BITS == 4:
        both = (before.to(tl.int64) & 0xFFFFFFFF) | (words.to(tl.int64) << 32)
        window = (both >> (24 + 4 * COLUMN)) & 0xFFF
    else:
        OCTET: tl.constexpr = 8 * BITS
        SPAN: tl.constexpr = 16
        both = (before.to(tl.int32) & 0xFFFF) | ((words.to(tl.int32) & ((1 << OCTET) - 1)) << SPAN)
        window = (both >> (SPAN + BITS * (COLUMN + 1) - 12)) & 0xFFF
    return tl.load(levels + window.to(tl.int32)).to(tl.float32) * scale


@triton.jit
def _octet_scales(
    scales, rows, row_ok, first_column, GROUP: tl.constexpr, num_columns, OCTETS: tl.constexpr, EVEN: tl.constexpr,
    num_rows, BY_GROUP: tl.constexpr
):  # fmt: skip
    """The scale of each octet, ``[ROWS, OCTETS]``; of each row, ``[ROWS, 1]``, where GROUP is 0."""
    if GROUP == 0:
        found = tl.load(scales + rows, mask=row_ok, other=0)[:, None]
    else:
        groups = (num_columns + GROUP - 1) // GROUP
        group = (first_column + tl.arange(0, OCTETS) * 8) // GROUP
        ok = _there(row_ok, group < groups, EVEN)
        if BY_GROUP:
            places = group[None, :] * num_rows + rows[:, None]
        else:
            places = rows[:, None] * groups + group[None, :]
        found = _load_lanes(scales, places, ok)
    return found


@triton.jit
def _step_scales(
    scales, rows, row_ok, first_column, GROUP: tl.constexpr, num_columns, COLUMNS: tl.constexpr
):  # fmt: skip
    """As ``_octet_scales``, for steps of whole groups: each is loaded once, and lies where its octets do."""
    GROUPS: tl.constexpr = COLUMNS // GROUP
    ROWS: tl.constexpr = rows.shape[0]
    groups = (num_columns + GROUP - 1) // GROUP
    group = first_column // GROUP + tl.arange(0, GROUPS)
    found = tl.load(
        scales + rows[:, None] * groups + group[None, :], mask=row_ok[:, None] & (group < groups)[None, :], other=0
    )
    return tl.reshape(tl.broadcast_to(found[:, :, None], (ROWS, GROUPS, GROUP // 8)), (ROWS, COLUMNS // 8))


@triton.jit
def _rows_tile(
    start, scales, levels, rows, row_ok, first_column, BITS: tl.constexpr, GROUP: tl.constexpr,
    num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TO: tl.constexpr, LANES: tl.constexpr, EVEN: tl.constexpr,
    num_rows, BY_GROUP: tl.constexpr
):  # fmt: skip
    """``[ROWS, COLUMNS]``, plain values in their dtype, codes in fp32, or TO. Rows that are not there are 0.

    With LANES columns are those of ``lane_columns``.
    """
    if BITS == _PLAIN:
        columns = first_column + tl.arange(0, COLUMNS)
        ok = _there(row_ok, columns < num_columns, EVEN)
        tile = tl.load(start + rows[:, None] * num_columns + columns[None, :], mask=ok, other=0)
    else:
        OCTETS: tl.constexpr = COLUMNS // 8
        WIDE: tl.constexpr = OCTETS // 4 if LANES and EVEN and (BITS == 4 or BITS == 8) and levels is None else 1
        w = _load_octets(start, rows, row_ok, first_column, 0, BITS, num_columns, OCTETS, EVEN, WIDE)
        if WIDE > 1 and GROUP > 0 and COLUMNS % GROUP == 0:
            scale = _step_scales(scales, rows, row_ok, first_column, GROUP, num_columns, COLUMNS)
        else:
            scale = _octet_scales(
                scales, rows, row_ok, first_column, GROUP, num_columns, OCTETS, EVEN, num_rows, BY_GROUP
            )
        if levels is not None:
            b = _load_octets(start, rows, row_ok, first_column, 1, BITS, num_columns, OCTETS, EVEN)
            if BITS == 1:
                older = _load_octets(start, rows, row_ok, first_column, 2, BITS, num_columns, OCTETS, EVEN)
                b = (b.to(tl.int32) << 8) | older.to(tl.int32)
            if runs_ptx():
                some = tl.full((), 0, tl.int32)
                if LANES:
                    # of any number, but of 32 bits, as fewer change how the matrix units take a tile
                    numbers = levels.to(tl.pointer_type(tl.int32), bitcast=True)
                    some = tl.load(numbers + tl.zeros((ROWS, 1), tl.int32))
                if tl.bfloat16 == TO:
                    c0, c1, c2, c3, c4, c5, c6, c7 = octet_columns(w, b, scale, some, BITS, True)
                    tile = _in_order(c0, c1, c2, c3, c4, c5, c6, c7, ROWS, COLUMNS, LANES)
                else:
                    c0, c1, c2, c3, c4, c5, c6, c7 = octet_columns(w, b, scale, some, BITS, False)
                    scale = scale.to(tl.float32) * _LEVELS
                    tile = _scaled_in_order(c0, c1, c2, c3, c4, c5, c6, c7, scale, ROWS, COLUMNS, LANES)
            else:
                scale = scale.to(tl.float32)
                tile = _in_order(
                    _level(w, b, levels, scale, 0, BITS), _level(w, b, levels, scale, 1, BITS),
                    _level(w, b, levels, scale, 2, BITS), _level(w, b, levels, scale, 3, BITS),
                    _level(w, b, levels, scale, 4, BITS), _level(w, b, levels, scale, 5, BITS),
                    _level(w, b, levels, scale, 6, BITS), _level(w, b, levels, scale, 7, BITS), ROWS, COLUMNS, LANES
                )  # fmt: skip
        elif runs_ptx():
            if tl.bfloat16 == TO:
                c0, c1, c2, c3, c4, c5, c6, c7 = plain_columns(w, scale, BITS, True)
                tile = _in_order(c0, c1, c2, c3, c4, c5, c6, c7, ROWS, COLUMNS, LANES)
            else:
                c0, c1, c2, c3, c4, c5, c6, c7 = plain_columns(w, scale, BITS, False)
                scale = scale.to(tl.float32)
                tile = _scaled_in_order(c0, c1, c2, c3, c4, c5, c6, c7, scale, ROWS, COLUMNS, LANES)
        else:
            scale = scale.to(tl.float32)
            shift = scale * (-((1 << BITS) - 1) / 2)
            tile = _in_order(
                _decoded(w, scale, shift, 0, BITS), _decoded(w, scale, shift, 1, BITS),
                _decoded(w, scale, shift, 2, BITS), _decoded(w, scale, shift, 3, BITS),
                _decoded(w, scale, shift, 4, BITS), _decoded(w, scale, shift, 5, BITS),
                _decoded(w, scale, shift, 6, BITS), _decoded(w, scale, shift, 7, BITS), ROWS, COLUMNS, LANES
            )  # fmt: skip
    return tile


@triton.jit
def _kept_column(start, numbers, place, scale, shift, COLUMN: tl.constexpr, BITS: tl.constexpr):
    """Column ``COLUMN`` of each octet, 0 where it is not kept.

    Args:
        start: the expert's values; or of each octet, for plain ones, the value before its first.
        numbers: in nibble j, which kept value of the octet column j is, from 1 on; 0 where it is not kept.
        place: number of the code before the octet's first; 0 for plain values.
        scale: of codes; ``shift`` is what a code of 0 gives.
    """
    number = ((numbers >> (4 * COLUMN)) & 15).to(tl.int32)
    keep = number != 0
    if BITS == _PLAIN:
        column = _load_lanes(start, number, keep)
    else:
        # one or two codes in a byte, so one less is the logarithm
        PER: tl.constexpr = 8 // BITS
        packed = _load_lanes(start, (place + number) >> (PER - 1), keep).to(tl.int32)
        code = (packed >> (((place + number) & (PER - 1)) * BITS)) & ((1 << BITS) - 1)
        column = tl.where(keep, code.to(tl.float32) * scale + shift, 0.0)
    return column


@triton.jit
def _bitmap_tile(
    t, s: tl.constexpr, expert, rows, row_ok, first_column, before, num_columns, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr
):  # fmt: skip
    """``[ROWS, COLUMNS]`` and the rows' kept values up to the tile's end, int32 ``[ROWS]``.

    A value lies at the row's first value + ``before`` + the kept ones of the bytes to the left in the tile + those
    below its bit in its own byte. The last are counted for all eight bits at once, in the nibbles of 32 bits.
    """
    row_bytes = (num_columns + 63) // 64 * 8
    places = first_column // 8 + tl.arange(0, COLUMNS // 8)
    ok = row_ok[:, None] & (places < row_bytes)[None, :]
    mask = t.mask + expert * t.mask_stride
    octets = _load_lanes(mask, rows[:, None] * row_bytes + places[None, :], ok).to(tl.uint32)
    spread = (octets | (octets << 12)) & 0x000F000F
    spread = (spread | (spread << 6)) & 0x03030303
    spread = (spread | (spread << 3)) & 0x11111111  # bit j in nibble j
    counts = spread * 0x11111111  # nibble j: kept among bits 0..j, at most 8
    numbers = counts & (spread * 15)  # and 0 where bit j is not set
    kept = (counts >> 28).to(tl.int32)
    if s.by_row:
        first = rows * t.row_stride
    else:
        first = tl.load(t.row_ptr + expert * t.row_ptr_stride + rows, mask=row_ok, other=0)
    place = (first + before)[:, None] + tl.cumsum(kept, 1) - kept - 1
    values = t.kept_values + expert * t.values_stride
    if t.starts is not None:
        values += tl.load(t.starts + expert * t.starts_stride)
    if s.value_bits == _PLAIN:
        values += place
        place = 0
        scale = 1.0
        shift = 0.0
    else:
        scales = t.value_scales + expert * t.value_scales_stride
        scale = _octet_scales(
            scales, rows, row_ok, first_column, s.value_group, num_columns, COLUMNS // 8, False, 0, False
        )
        scale = scale.to(tl.float32)
        shift = scale * (-((1 << s.value_bits) - 1) / 2)
    tile = _by_octet(
        _kept_column(values, numbers, place, scale, shift, 0, s.value_bits),
        _kept_column(values, numbers, place, scale, shift, 1, s.value_bits),
        _kept_column(values, numbers, place, scale, shift, 2, s.value_bits),
        _kept_column(values, numbers, place, scale, shift, 3, s.value_bits),
        _kept_column(values, numbers, place, scale, shift, 4, s.value_bits),
        _kept_column(values, numbers, place, scale, shift, 5, s.value_bits),
        _kept_column(values, numbers, place, scale, shift, 6, s.value_bits),
        _kept_column(values, numbers, place, scale, shift, 7, s.value_bits),
        ROWS, COLUMNS
    )  # fmt: skip
    return tile, before + tl.sum(kept, 1)


@triton.jit
def kept_before(t, expert, rows, row_ok, first_column, num_columns, COLUMNS: tl.constexpr):
    """Kept values of each row left of ``first_column``, a multiple of COLUMNS; int32, one for each row."""
    # of a local number: the interpreter's integers can't be divided by a constexpr
    EVERY: tl.constexpr = 64
    tl.static_assert(COLUMNS % EVERY == 0, "a block begins where no pointer is")
    pointers = t.pointers + expert * t.pointers_stride
    places = rows * tl.cdiv(num_columns, EVERY) + first_column // EVERY
    return tl.load(pointers + places, mask=row_ok, other=0).to(tl.int32)


@triton.jit
def load_tile(
    t, s: tl.constexpr, expert, rows, first_column, before, num_rows, num_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr, LANES: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """The sum of a weight's terms for one expert.

    Args:
        t: a ``Tile``.
        s: its ``TileSpec``; at least one term.
        expert: int64, row of the parameters.
        rows: int32 ``[ROWS]``; those from ``num_rows`` on give 0.
        first_column: a multiple of COLUMNS, which is a power of two, at least 8.
        before: kept values of each row left of the tile, int32 ``[ROWS]``; only bitmaps use it.
        DOT: dtype of the result. Terms are added in fp32.
        LANES: with columns in the order of ``lane_columns``, for ``codes_in_lanes`` alone.
        EVEN: all rows and columns of the tile are there.
    Returns:
        ``[ROWS, COLUMNS]``, finite where no column is there; ``before`` of the next tile.
    """
    if EVEN:
        row_ok = tl.full((ROWS,), True, tl.int1)
    else:
        row_ok = rows < num_rows
    after = before
    # what is added to others is not rounded before
    ALONE: tl.constexpr = (s.center_bits > 0) + (s.own_bits > 0) + (s.value_bits > 0) == 1
    TO: tl.constexpr = DOT if ALONE else tl.float32
    if s.center_bits > 0:
        tile = _rows_tile(
            t.center, t.center_scales, t.center_levels, rows, row_ok, first_column, s.center_bits, s.center_group,
            num_columns, ROWS, COLUMNS, TO, LANES, EVEN, num_rows, False
        )  # fmt: skip
    if s.own_bits > 0:
        scales = t.own_scales
        if s.own_bits != _PLAIN:
            scales += expert * t.own_scales_stride
        own = _rows_tile(
            t.own + expert * t.own_stride, scales, t.own_levels, rows, row_ok, first_column, s.own_bits, s.own_group,
            num_columns, ROWS, COLUMNS, TO, LANES, EVEN, num_rows, s.own_by_group
        )  # fmt: skip
        if s.center_bits > 0:
            tile = tile.to(tl.float32) + own.to(tl.float32)
        else:
            tile = own
    if s.value_bits > 0:
        pruned, after = _bitmap_tile(
            t, s, expert, rows, row_ok, first_column, before, num_columns, ROWS, COLUMNS
        )  # fmt: skip
        if s.center_bits + s.own_bits > 0:
            tile = tile.to(tl.float32) + pruned.to(tl.float32)
        else:
            tile = pruned
    return tile.to(DOT), after
