"""Plain codes to values on NVIDIA's cards: eight columns at a time, two of them an instruction, in bfloat16 throughout.

A code q below 128 behind the byte 0x43 is 128 + q in bfloat16. A level is q - (2**bits - 1) / 2: its whole part
q - 2**(bits - 1) is exact, and the half comes with the scale, by one fused multiply-add that rounds once, as fp32
products that are rounded to bfloat16 do. So these are the bits of the plain form (tiles.py).
"""

import struct
from collections.abc import Callable

import triton
import triton.language as tl

from resmoe_vllm.kernels.gpu.ptx import Program

# Inputs of a program, behind its eight outputs.
_WORDS, _UPPER, _SCALES = "$8", "$9", "$10"
# lop3's table for (a & b) | c
_AND_OR = 0xEA
# pairs of bfloat16
_ONES, _HALVES, _MINUS_ZEROS, _EXPONENTS = 0x3F803F80, 0x3F003F00, 0x80008000, 0x43004300


def _spread_2(program: Program, words: str) -> list[str]:
    """Codes of two columns in the low ends of either half, of every pair of columns."""
    both = program("or.b32", words, program("shl.b32", words, 14))
    return [both, *(program("shr.u32", both, 4 * pair) for pair in (1, 2, 3))]


def _bytes_1(program: Program) -> list[str]:
    both = program("or.b32", _WORDS, program("shl.b32", _WORDS, 15))
    shifted = [both, *(program("shr.u32", both, 2 * pair) for pair in (1, 2, 3))]
    return [program("lop3.b32", own, 0x00010001, _EXPONENTS, _AND_OR) for own in shifted]


def _bytes_2(program: Program) -> list[str]:
    # an integer of 16 bits may come with its sign above
    spread = _spread_2(program, program("and.b32", _WORDS, 0xFFFF))
    return [program("lop3.b32", own, 0x00030003, _EXPONENTS, _AND_OR) for own in spread]


def _bytes_3(program: Program) -> list[str]:
    low = [
        program("lop3.b32", own, 0x00030003, _EXPONENTS, _AND_OR)
        for own in _spread_2(program, program("and.b32", _WORDS, 0xFFFF))
    ]
    # bit c of the upper plane, from bit 16 on: of even columns to bit 2, of odd ones to bit 18
    upper = program("shr.u32", _WORDS, 14)
    both = program("or.b32", upper, program("shl.b32", upper, 15))
    shifted = [both, *(program("shr.u32", both, 2 * pair) for pair in (1, 2, 3))]
    return [program("lop3.b32", own, 0x00040004, rest, _AND_OR) for own, rest in zip(shifted, low, strict=True)]


def _bytes_4(program: Program) -> list[str]:
    odd = program("shr.u32", _WORDS, 4)
    pairs = [program("prmt.b32", _WORDS, odd, 0x0400 + 0x101 * pair) for pair in range(4)]
    return [program("lop3.b32", own, 0x000F000F, _EXPONENTS, _AND_OR) for own in pairs]


def _whole_8(program: Program) -> list[str]:
    """q - 128 of each pair: a byte alone is a small number, 2**127 times which is q / 64."""
    power, offset = program("mov.b32", 0x7F007F00), program("mov.b32", _bfloat16_pair(-2.0))
    pairs = []
    for number in range(4):
        first = 2 * number % 4
        alone = program("prmt.b32", _WORDS if number < 2 else _UPPER, 0x0, 0x4040 | first | first + 1 << 8)
        pairs.append(program("fma.rn.bf16x2", alone, power, offset))
    return pairs


_BYTES: dict[int, Callable[[Program], list[str]]] = {1: _bytes_1, 2: _bytes_2, 3: _bytes_3, 4: _bytes_4}


def _bfloat16_pair(value: float) -> int:
    bits = int.from_bytes(struct.pack(">f", value))
    if bits & 0xFFFF:
        raise ValueError(f"{value} is no bfloat16 number")
    return (bits >> 16) * 0x10001


def octet_program(bits: int, *, scaled: bool) -> str:
    """PTX that decodes an octet.

    Args:
        bits: of a code: 1, 2, 3, 4 or 8.
        scaled: levels times the scale, rounded once; else levels.
    Returns:
        Its outputs are eight bfloat16; then come the inputs, 32 bits each: the codes (of 3 bits the upper plane from
        bit 16 on), the upper half of those of 8 bits, and the scale, a bfloat16 in the lower half.
    """
    program = Program()
    if bits == 8:
        whole = _whole_8(program)
    else:
        ones, offset = program("mov.b32", _ONES), program("mov.b32", _bfloat16_pair(-128.0 - 2 ** (bits - 1)))
        whole = [program("fma.rn.bf16x2", own, ones, offset) for own in _BYTES[bits](program)]
    factor, rest = program("mov.b32", _bfloat16_pair(64.0 if bits == 8 else 1.0)), program("mov.b32", _HALVES)
    if scaled:
        scale, nothing = program("prmt.b32", _SCALES, 0x0, 0x1010), program("mov.b32", _MINUS_ZEROS)
        rest = program("fma.rn.bf16x2", scale, rest, nothing)
        factor = program("fma.rn.bf16x2", scale, factor, nothing) if bits == 8 else scale
    return program.text([program("fma.rn.bf16x2", own, factor, rest) for own in whole])


_CONSTRAINTS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r")
_LEVELS_1, _VALUES_1 = (tl.constexpr(octet_program(1, scaled=scaled)) for scaled in (False, True))
_LEVELS_2, _VALUES_2 = (tl.constexpr(octet_program(2, scaled=scaled)) for scaled in (False, True))
_LEVELS_3, _VALUES_3 = (tl.constexpr(octet_program(3, scaled=scaled)) for scaled in (False, True))
_LEVELS_4, _VALUES_4 = (tl.constexpr(octet_program(4, scaled=scaled)) for scaled in (False, True))
_LEVELS_8, _VALUES_8 = (tl.constexpr(octet_program(8, scaled=scaled)) for scaled in (False, True))


@triton.jit
def plain_columns(words, scale, BITS: tl.constexpr, SCALED: tl.constexpr):
    """The eight columns of each octet, bfloat16: levels, with SCALED times ``scale``, bfloat16."""
    LEVELS: tl.constexpr = (
        _LEVELS_1 if BITS == 1 else _LEVELS_2 if BITS == 2 else _LEVELS_3 if BITS == 3
        else _LEVELS_4 if BITS == 4 else _LEVELS_8
    )  # fmt: skip
    VALUES: tl.constexpr = (
        _VALUES_1 if BITS == 1 else _VALUES_2 if BITS == 2 else _VALUES_3 if BITS == 3
        else _VALUES_4 if BITS == 4 else _VALUES_8
    )  # fmt: skip
    PROGRAM: tl.constexpr = VALUES if SCALED else LEVELS
    if BITS == 8:
        upper = (words >> 32).to(tl.int32)
    else:
        upper = words.to(tl.int32)
    return tl.inline_asm_elementwise(
        PROGRAM, _CONSTRAINTS, [words.to(tl.int32), upper, scale.to(tl.int16, bitcast=True).to(tl.int32)],
        (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True, pack=1
    )  # fmt: skip
