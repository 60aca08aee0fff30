"""Trellis codes to levels on NVIDIA's cards: eight columns at a time, by byte permutes, with no table in memory.

``prmt.b32`` looks up four nibbles at once: three bits of each choose one of eight bytes, the fourth asks for that
byte's sign instead, which is 0 where no byte is negative. So two of them, one with the fourth bits turned around, look
up four entries of a table of 16, each 0 where the other has the entry. Tables are raised so that a level and 128 is
the sum of entries, a byte u. Below a byte of zeros it is the bfloat16 number u * 2**-133, subnormal or not: one packed
multiply-add, which is exact, makes levels of two columns, one product values.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import triton
import triton.language as tl

from compress_tools.format.trellis import field_bits
from compress_tools.format.trellis_tables import TABLES
from resmoe_vllm.kernels.gpu.ptx import Program

# what a byte is more than its level
_RAISED = 128
# Levels come in units of it.
LEVEL_UNIT = 2.0**-6
# Inputs of the program, behind its eight outputs: codes of an octet, those before it, the scale twice, six words.
_WORDS, _BEFORE, _SCALES = "$8", "$9", "$10"
_HELD, _HELD_WORDS = 11, 6


class _Quad(NamedTuple):
    """Four columns that are looked up together.

    Attributes:
        selectors: by field of the state, what chooses the entries: four nibbles in the low half.
        pairs: number of a pair of columns and the bytes in which they are.
    """

    selectors: list[str]
    pairs: dict[int, tuple[int, int]]


def raised_tables(bits: int) -> list[list[int]]:
    """Tables by field: no entry is negative or above 127, and sums are levels and 128."""
    tables = [[entry - min(table) for entry in table] for table in TABLES[bits]]
    rest = _RAISED + sum(min(table) for table in TABLES[bits])
    tables[0] = [entry + rest for entry in tables[0]]
    return tables


def _word(table: Sequence[int]) -> int:
    return int.from_bytes(bytes(table), "little")


def _look_up(program: Program, table: Sequence[int], held: Sequence[str], selector: str) -> list[str]:
    """Four entries, or what gives them when it is added up; ``held`` are the first words of each eight."""
    found = [program("prmt.b32", held[0], _word(table[4:8]), selector)]
    if len(table) > 8:
        turned = program("xor.b32", selector, 0x8888)
        found.append(program("prmt.b32", held[1], _word(table[12:]), turned))
    return found


def _reversed_symbols(table: Sequence[int], bits: int) -> list[int]:
    """A row's older symbols lie lower, in a state higher."""
    count = 4 // bits
    places = range(count)
    symbol = (1 << bits) - 1
    return [
        table[sum((nibble >> bits * place & symbol) << bits * (count - 1 - place) for place in places)]
        for nibble in range(len(table))
    ]


def _quads_1(program: Program) -> list[_Quad]:
    both = program("prmt.b32", _BEFORE, _WORDS, 0x5410)
    quads = []
    for first in (0, 2):
        # nibbles of columns c and c + 4: the oldest field of c, the next, which is c + 4's oldest, and so on
        two = [program("shr.u32", both, 5 + column) for column in (first, first + 1)]
        shifted = [program("shr.u32", both, 9 + column) for column in (first, first + 1)]
        newest, oldest = program("prmt.b32", *two, 0x0051), program("prmt.b32", *two, 0x0040)
        selectors = [newest, program("prmt.b32", *shifted, 0x0040), oldest]
        quads.append(_Quad(selectors, {first // 2: (0, 2), first // 2 + 2: (1, 3)}))
    return quads


def _quads_2(program: Program) -> list[_Quad]:
    both = program("prmt.b32", _BEFORE, _WORDS, 0x5410)
    # nibbles of even and of odd columns, from the oldest field of columns 0 and 1 on; the next one
    even, odd, next_even, next_odd = (program("shr.u32", both, shift) for shift in (6, 8, 10, 12))
    aligned = [program("prmt.b32", even, odd, sel) for sel in (0x0040, 0x0051, 0x0062)]
    between = [program("prmt.b32", next_even, next_odd, sel) for sel in (0x0040, 0x0051)]
    return [
        _Quad([aligned[1], between[0], aligned[0]], {0: (0, 2), 1: (1, 3)}),
        _Quad([aligned[2], between[1], aligned[1]], {2: (0, 2), 3: (1, 3)}),
    ]


def _quads_3(program: Program) -> list[_Quad]:
    # one nibble a symbol: its two low bits, and the high one, are moved apart by products
    low = program("prmt.b32", _WORDS, 0, 0x4140)
    high = program("shr.u32", _WORDS, 16)
    high = program("and.b32", program("mul.lo.u32", high, 0x1001), 0x000F000F)
    symbols = _spread(program, low, high)
    # of the octet before the last four, in the upper half
    low = program("prmt.b32", _BEFORE, 0, 0x4144)
    high = program("and.b32", program("shr.u32", _BEFORE, 4), 0x000F0000)
    return _natural(program, symbols, _spread(program, low, high), 4)


def _spread(program: Program, low: str, high: str) -> str:
    for factor, moved in ((15, 0x00F000F0), (3, 0x0C0C0C0C)):
        low = program("mad.lo.u32", program("and.b32", low, moved), factor, low)
    for factor, mask in ((0x41, 0x03030303), (0x09, 0x11111111)):
        high = program("and.b32", program("mul.lo.u32", high, factor), mask)
    return program("mad.lo.u32", high, 4, low)


def _quads_4(program: Program) -> list[_Quad]:
    return _natural(program, _WORDS, _BEFORE, 3)


def _natural(program: Program, words: str, before: str, fields: int) -> list[_Quad]:
    """A nibble a symbol, a symbol a field."""
    lower, upper = [words], [program("shr.u32", words, 16)]
    for age in range(1, fields):
        lower.append(program("shf.r.wrap.b32", before, words, 32 - 4 * age))
        upper.append(program("shr.u32", words, 16 - 4 * age))
    return [_Quad(lower, {0: (0, 1), 1: (2, 3)}), _Quad(upper, {2: (0, 1), 3: (2, 3)})]


_QUADS: dict[int, Callable[[Program], list[_Quad]]] = {1: _quads_1, 2: _quads_2, 3: _quads_3, 4: _quads_4}


def octet_tables(bits: int) -> list[list[int]]:
    """Tables by field, by the symbols as they lie in a row."""
    tables = raised_tables(bits)
    return [_reversed_symbols(table, bits) for table in tables] if field_bits(bits) == 4 else tables


def held_program(bits: int) -> str:
    """PTX that puts half of the tables' words into registers, as its six outputs; with 3 bits the last two are 0.

    A byte permute takes one word as it stands; the other, where the assembler knew it, would be moved to a register
    for each permute. So it is made of the thread's number: t * t + t is even.
    """
    words = [_word(table[first : first + 4]) for table in octet_tables(bits) for first in range(0, len(table), 8)]
    lines = ["mov.u32 t, %tid.x;", "mad.lo.u32 t, t, t, t;", "and.b32 t, t, 1;"]
    lines += [f"xor.b32 ${number}, t, {word:#x};" for number, word in enumerate([*words, 0, 0][:_HELD_WORDS])]
    return "\n".join(["{", ".reg .b32 t;", *lines, "}"])


def octet_program(bits: int, *, scaled: bool) -> str:
    """PTX that decodes an octet.

    Args:
        bits: of a symbol.
        scaled: levels times the scale, rounded once; else levels. Both in units of ``LEVEL_UNIT``.
    Returns:
        Its outputs are eight bfloat16; then come the inputs, 32 bits each: the codes, those before them, and with
        ``scaled`` the scale twice, bfloat16; then what ``held_program`` gives.
    """
    program = Program()
    tables = octet_tables(bits)
    each = len(tables[0]) // 8
    held = [[f"${_HELD + each * field + half}" for half in range(each)] for field in range(len(tables))]
    # bfloat16 twice: 2**127, with which 2**-133 becomes the unit, and -128 units
    power, lower, nothing = (program("mov.b32", twice) for twice in (0x7F007F00, 0xC000C000, 0x80008000))
    pairs: dict[int, str] = {}
    for quad in _QUADS[bits](program):
        looked_up = [_look_up(program, *of_field) for of_field in zip(tables, held, quad.selectors, strict=True)]
        total = program.sum([part for parts in looked_up for part in parts])
        for number, (first, second) in quad.pairs.items():
            pair = program("prmt.b32", total, 0, 0x4040 | first | second << 8)
            levels = program("fma.rn.bf16x2", pair, power, lower)
            # a product as cards before sm_90 have it
            pairs[number] = program("fma.rn.bf16x2", levels, _SCALES, nothing) if scaled else levels
    return program.text([pairs[number] for number in range(4)])


_LEVELS_1, _VALUES_1 = (tl.constexpr(octet_program(1, scaled=scaled)) for scaled in (False, True))
_LEVELS_2, _VALUES_2 = (tl.constexpr(octet_program(2, scaled=scaled)) for scaled in (False, True))
_LEVELS_3, _VALUES_3 = (tl.constexpr(octet_program(3, scaled=scaled)) for scaled in (False, True))
_LEVELS_4, _VALUES_4 = (tl.constexpr(octet_program(4, scaled=scaled)) for scaled in (False, True))
_HELD_1, _HELD_2, _HELD_3, _HELD_4 = (tl.constexpr(held_program(bits)) for bits in (1, 2, 3, 4))


# A scale, the low half of its input, twice and over ``LEVEL_UNIT``.
_TWICE = tl.constexpr(
    "{ .reg .b32 t, by, nothing; mov.b32 by, 0x42804280; mov.b32 nothing, 0x80008000; "
    "prmt.b32 t, $1, 0, 0x1010; fma.rn.bf16x2 $0, t, by, nothing; }"
)


@triton.jit
def octet_columns(words, before, scale, rows, BITS: tl.constexpr, SCALED: tl.constexpr):
    """The eight columns of each octet, bfloat16: levels in units of ``LEVEL_UNIT``, or with SCALED values.

    Args:
        words: codes of each octet.
        before: those before them.
        scale: bfloat16, for SCALED.
        rows: int32, what tables' words are held for: of one number all lanes hold the same, of ``[ROWS, 1]`` loaded
            values each row has its own, which Triton follows back to a load where it looks for a tile's layout.
    """
    LEVELS: tl.constexpr = _LEVELS_1 if BITS == 1 else _LEVELS_2 if BITS == 2 else _LEVELS_3 if BITS == 3 else _LEVELS_4
    VALUES: tl.constexpr = _VALUES_1 if BITS == 1 else _VALUES_2 if BITS == 2 else _VALUES_3 if BITS == 3 else _VALUES_4
    PROGRAM: tl.constexpr = VALUES if SCALED else LEVELS
    HELD: tl.constexpr = _HELD_1 if BITS == 1 else _HELD_2 if BITS == 2 else _HELD_3 if BITS == 3 else _HELD_4
    h0, h1, h2, h3, h4, h5 = tl.inline_asm_elementwise(
        HELD, "=r,=r,=r,=r,=r,=r,r", [rows],
        (tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
    )  # fmt: skip
    scales = words.to(tl.int32)
    if SCALED:
        one = scale.to(tl.int16, bitcast=True).to(tl.int32)
        scales = tl.inline_asm_elementwise(_TWICE, "=r,r", [one], tl.int32, is_pure=True, pack=1)
    return tl.inline_asm_elementwise(
        PROGRAM, "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r,r,r,r",
        [words.to(tl.int32), before.to(tl.int32), scales, h0, h1, h2, h3, h4, h5],
        (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True, pack=1
    )  # fmt: skip
