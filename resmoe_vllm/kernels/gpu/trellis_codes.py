"""Trellis codes to levels on NVIDIA's cards: eight columns at a time, by byte permutes, with no table in memory.

``prmt.b32`` looks up four nibbles at once: three bits of each choose one of eight bytes, the fourth asks for that
byte's sign instead, which is 0 where no byte is negative. So two of them, one with the fourth bits turned around, look
up four entries of a table of 16, each 0 where the other has the entry. A level is the difference of two sums of
entries, each from 0 to 127, which behind the byte 0x43 is 128 more in bfloat16: one packed subtraction gives levels.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import triton
import triton.language as tl
from triton import knobs
from triton.language.target_info import current_target
from triton.runtime.jit import constexpr_function

from compress_tools.format.trellis import field_bits
from compress_tools.format.trellis_tables import TABLES

# bfloat16 has seven bits behind its first one.
_MOST = 127
# Inputs of the program, behind its eight outputs: codes of an octet, those before it, the scale twice.
_WORDS, _BEFORE, _SCALES = "$8", "$9", "$10"
_FIRST_CARD = 80


class _Program:
    """Lines of PTX; every value has a register of its own."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, operation: str, *operands: str | int) -> str:
        register = f"v{len(self.lines)}"
        words = [own if isinstance(own, str) else hex(own) for own in operands]
        self.lines.append(f"{operation} {register}, {', '.join(words)};")
        return register

    def sum(self, values: Sequence[str]) -> str:
        """Of bytes, none of which overflows."""
        total = values[0]
        for value in values[1:]:
            total = self("add.u32", total, value)
        return total

    def text(self, pairs: Sequence[str]) -> str:
        """The whole program; ``pairs`` hold columns 0 and 1, ..., 6 and 7."""
        stores = [f"mov.b32 {{${2 * number}, ${2 * number + 1}}}, {pair};" for number, pair in enumerate(pairs)]
        return "\n".join(["{", f".reg .b32 v<{len(self.lines)}>;", *self.lines, *stores, "}"])


class _Quad(NamedTuple):
    """Four columns that are looked up together.

    Attributes:
        selectors: by field of the state, what chooses the entries: four nibbles in the low half.
        pairs: number of a pair of columns and the bytes in which they are.
    """

    selectors: list[str]
    pairs: dict[int, tuple[int, int]]


def split_tables(bits: int) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Tables by field: what is added and what is subtracted for a level; sums of entries lie within 0 and 127."""
    tables = dict(enumerate(TABLES[bits]))
    for count in range(1, len(tables)):
        for added in combinations(tables, count):
            plus = {field: list(tables[field]) for field in added}
            minus = {field: [-entry for entry in table] for field, table in tables.items() if field not in added}
            # the same offset on both sides, which is no part of the level then
            offset = -min(sum(map(min, side.values())) for side in (plus, minus))
            if offset + max(sum(map(max, side.values())) for side in (plus, minus)) <= _MOST:
                return _raised(plus, offset), _raised(minus, offset)
    raise ValueError(f"the tables of {bits} bits have no two sums of seven bits")


def _raised(tables: dict[int, list[int]], offset: int) -> dict[int, list[int]]:
    """Sums are more by ``offset``, and no entry is negative."""
    rest = offset + sum(map(min, tables.values()))
    raised = {}
    for field, table in tables.items():
        raised[field] = [entry - min(table) + rest for entry in table]
        rest = 0
    return raised


def _word(table: Sequence[int]) -> int:
    return int.from_bytes(bytes(table), "little")


def _look_up(program: _Program, table: Sequence[int], selector: str) -> list[str]:
    """Four entries, or what gives them when it is added up."""
    found = [program("prmt.b32", _word(table[:4]), _word(table[4:8]), selector)]
    if len(table) > 8:
        turned = program("xor.b32", selector, 0x8888)
        found.append(program("prmt.b32", _word(table[8:12]), _word(table[12:]), turned))
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


def _quads_1(program: _Program) -> list[_Quad]:
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


def _quads_2(program: _Program) -> list[_Quad]:
    both = program("prmt.b32", _BEFORE, _WORDS, 0x5410)
    # nibbles of even and of odd columns, from the oldest field of columns 0 and 1 on; the next one
    even, odd, next_even, next_odd = (program("shr.u32", both, shift) for shift in (6, 8, 10, 12))
    aligned = [program("prmt.b32", even, odd, sel) for sel in (0x0040, 0x0051, 0x0062)]
    between = [program("prmt.b32", next_even, next_odd, sel) for sel in (0x0040, 0x0051)]
    return [
        _Quad([aligned[1], between[0], aligned[0]], {0: (0, 2), 1: (1, 3)}),
        _Quad([aligned[2], between[1], aligned[1]], {2: (0, 2), 3: (1, 3)}),
    ]


def _quads_3(program: _Program) -> list[_Quad]:
    # one nibble a symbol: its two low bits, and the high one, are moved apart by products
    low = program("prmt.b32", _WORDS, 0, 0x4140)
    high = program("shr.u32", _WORDS, 16)
    high = program("and.b32", program("mul.lo.u32", high, 0x1001), 0x000F000F)
    symbols = _spread(program, low, high)
    # of the octet before the last four, in the upper half
    low = program("prmt.b32", _BEFORE, 0, 0x4144)
    high = program("and.b32", program("shr.u32", _BEFORE, 4), 0x000F0000)
    return _natural(program, symbols, _spread(program, low, high), 4)


def _spread(program: _Program, low: str, high: str) -> str:
    for factor, moved in ((15, 0x00F000F0), (3, 0x0C0C0C0C)):
        low = program("mad.lo.u32", program("and.b32", low, moved), factor, low)
    for factor, mask in ((0x41, 0x03030303), (0x09, 0x11111111)):
        high = program("and.b32", program("mul.lo.u32", high, factor), mask)
    return program("mad.lo.u32", high, 4, low)


def _quads_4(program: _Program) -> list[_Quad]:
    return _natural(program, _WORDS, _BEFORE, 3)


def _natural(program: _Program, words: str, before: str, fields: int) -> list[_Quad]:
    """A nibble a symbol, a symbol a field."""
    lower, upper = [words], [program("shr.u32", words, 16)]
    for age in range(1, fields):
        lower.append(program("shf.r.wrap.b32", before, words, 32 - 4 * age))
        upper.append(program("shr.u32", words, 16 - 4 * age))
    return [_Quad(lower, {0: (0, 1), 1: (2, 3)}), _Quad(upper, {2: (0, 1), 3: (2, 3)})]


_QUADS: dict[int, Callable[[_Program], list[_Quad]]] = {1: _quads_1, 2: _quads_2, 3: _quads_3, 4: _quads_4}


def octet_program(bits: int, *, scaled: bool) -> str:
    """PTX that decodes an octet.

    Args:
        bits: of a symbol.
        scaled: levels times the scale, rounded once; else levels.
    Returns:
        Its outputs are eight bfloat16; then come the inputs, 32 bits each: the codes, those before them, and with
        ``scaled`` the scale twice, bfloat16.
    """
    program = _Program()
    sides = split_tables(bits)
    minus_one, minus_zero = program("mov.b32", 0xBF80BF80), program("mov.b32", 0x80008000)
    pairs: dict[int, str] = {}
    for quad in _QUADS[bits](program):
        plus, minus = (
            program.sum(
                [
                    part
                    for field, table in side.items()
                    for part in _look_up(
                        program,
                        table if field_bits(bits) == 3 else _reversed_symbols(table, bits),
                        quad.selectors[field],
                    )
                ]
            )
            for side in sides
        )
        for number, (first, second) in quad.pairs.items():
            # 128 + plus, 128 + minus
            select = 0x4040 | first | second << 8
            terms = [program("prmt.b32", sums, 0x43434343, select) for sums in (plus, minus)]
            # a subtraction and a product as cards before sm_90 have them
            levels = program("fma.rn.bf16x2", terms[1], minus_one, terms[0])
            pairs[number] = program("fma.rn.bf16x2", levels, _SCALES, minus_zero) if scaled else levels
    return program.text([pairs[number] for number in range(4)])


_CONSTRAINTS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r")
_LEVELS_1, _VALUES_1 = (tl.constexpr(octet_program(1, scaled=scaled)) for scaled in (False, True))
_LEVELS_2, _VALUES_2 = (tl.constexpr(octet_program(2, scaled=scaled)) for scaled in (False, True))
_LEVELS_3, _VALUES_3 = (tl.constexpr(octet_program(3, scaled=scaled)) for scaled in (False, True))
_LEVELS_4, _VALUES_4 = (tl.constexpr(octet_program(4, scaled=scaled)) for scaled in (False, True))


@constexpr_function
def has_programs() -> bool:
    """Whether kernels are compiled for a card that runs them; the interpreter has no assembler."""
    target = current_target()
    return (
        not knobs.runtime.interpret and target is not None and target.backend == "cuda" and target.arch >= _FIRST_CARD
    )


@triton.jit
def octet_columns(words, before, scale, BITS: tl.constexpr, SCALED: tl.constexpr):
    """The eight columns of each octet, bfloat16: levels, with SCALED times ``scale``, fp32 with a bfloat16 in it."""
    LEVELS: tl.constexpr = _LEVELS_1 if BITS == 1 else _LEVELS_2 if BITS == 2 else _LEVELS_3 if BITS == 3 else _LEVELS_4
    VALUES: tl.constexpr = _VALUES_1 if BITS == 1 else _VALUES_2 if BITS == 2 else _VALUES_3 if BITS == 3 else _VALUES_4
    PROGRAM: tl.constexpr = VALUES if SCALED else LEVELS
    upper = scale.to(tl.uint32, bitcast=True)
    scales = (upper | (upper >> 16)).to(tl.int32, bitcast=True)
    return tl.inline_asm_elementwise(
        PROGRAM, _CONSTRAINTS, [words.to(tl.int32), before.to(tl.int32), scales],
        (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True, pack=1
    )  # fmt: skip
