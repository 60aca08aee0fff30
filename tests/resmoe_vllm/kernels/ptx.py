"""Runs programs of PTX line by line, by a few rules."""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def bfloat16_of(halves: Tensor) -> Tensor:
    """Of their bits, fp64."""
    return ((halves & 0xFFFF) << 16).to(torch.int32).view(torch.float32).double()


def _prmt(low: Tensor, high: Tensor, selectors: Tensor) -> Tensor:
    found = torch.zeros_like(low)
    for place in range(4):
        selector = selectors >> 4 * place & 15
        byte = (low | high << 32) >> 8 * (selector & 7) & 255
        found |= torch.where(selector > 7, (byte >> 7) * 255, byte) << 8 * place
    return found


def _lop3(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    found = torch.zeros_like(a)
    for number in range(8):
        chosen = [own if number >> place & 1 else ~own for place, own in ((2, a), (1, b), (0, c))]
        found |= torch.where(table >> number & 1 == 1, chosen[0] & chosen[1] & chosen[2], 0)
    return found & _MASK


def _fma(left: Tensor, right: Tensor, added: Tensor) -> Tensor:
    halves = []
    for shift in (0, 16):
        exact = bfloat16_of(left >> shift) * bfloat16_of(right >> shift) + bfloat16_of(added >> shift)
        halves.append(exact.float().bfloat16().view(torch.int16).long() & 0xFFFF)
    return halves[0] | halves[1] << 16


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "mov.b32": lambda value: value,
    "mov.u32": lambda value: value,
    "prmt.b32": _prmt,
    "shr.u32": lambda value, by: value >> by,
    "shf.r.wrap.b32": lambda low, high, by: (low >> by) | (high << 32 - by & _MASK),
    "xor.b32": torch.bitwise_xor,
    "and.b32": torch.bitwise_and,
    "or.b32": torch.bitwise_or,
    "shl.b32": lambda value, by: value << by & _MASK,
    "lop3.b32": _lop3,
    "add.u32": lambda left, right: left + right & _MASK,
    "mul.lo.u32": lambda left, right: left * right & _MASK,
    "mad.lo.u32": lambda left, right, added: left * right + added & _MASK,
    "fma.rn.bf16x2": _fma,
}


def run_ptx(program: str, registers: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is in the registers then."""
    registers = {name: tensor & _MASK for name, tensor in registers.items()}
    lines = program.splitlines()
    assert lines[0] == "{"
    assert lines[-1] == "}"
    assert lines[1].startswith(".reg")
    count = len(next(iter(registers.values())))
    for line in lines[2:-1]:
        if stored := re.fullmatch(r"mov\.b32 \{(\S+), (\S+)\}, (\w+);", line):
            registers[stored[1]] = registers[stored[3]] & 0xFFFF
            registers[stored[2]] = registers[stored[3]] >> 16
        else:
            found = re.fullmatch(r"(\S+) (\S+), (.*);", line)
            assert found is not None, line
            operands = [
                torch.tensor(int(own, 0)).expand(count) if own[0].isdigit() else registers[own]
                for own in found[3].split(", ")
            ]
            registers[found[2]] = _OPERATIONS[found[1]](*operands)
    return registers


def run_octets(program: str, inputs: Sequence[Tensor]) -> Tensor:
    """The eight columns that a program makes of its inputs, bfloat16 in fp64 ``[N, 8]``."""
    found = run_ptx(program, {f"${8 + number}": tensor for number, tensor in enumerate(inputs)})
    return torch.stack([bfloat16_of(found[f"${column}"]) for column in range(8)], 1)
