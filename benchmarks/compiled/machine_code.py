"""What stands in a kernel's machine code: its main loops, what they load and how, registers, spills.

A main loop is an innermost loop with products on the matrix units. Loops are found in the graph of jumps, not by
jumping back alone: compilers put rare code behind the end of a kernel.
"""

import ast
import re
import subprocess
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import triton

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# multiply-adds of one instruction, for each warp that issues it
_MMA = {
    re.compile(r"^HMMA\.(\d{1,2}?)(8|16)(8|16|32)\b"): 1,
    re.compile(r"^HGMMA\.(\d+)x(\d+)x(\d+)"): 4,
}
# on the matrix units too: their size does not stand there, or says little, as warps repeat each other's products
_SIZELESS = re.compile(r"^UTC\w*MMA|^v_mfma_")
_ASYNC = re.compile(r"^(LDGSTS|UTMALDG|UBLKCP)|^(buffer|global)_load\w*\b.*\blds\b")
_LOAD = re.compile(r"LDG\b|LDG\.|(global|buffer|flat)_load")
_TWO_BYTES = re.compile(r"^LDG\S*\.[US]16\b|^(global|buffer|flat)_load_(u|s)?(short|16)")
_SINGLE = re.compile(r"^LDG\S*\.[US](8|16)\b|^(global|buffer|flat)_load_(u|s)?(byte|short|8|16)")
_SPILLED = re.compile(r"^(LDL|STL|scratch_(load|store))\b")
# Says that values lie side by side which don't, for the layout's sake; so each must be a load of its own.
_GATHER = "_kept_column"
# Loads whatever it is told to: what is loaded, its caller says.
_ANY_LOAD = "_load_lanes"

Source = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Instruction:
    """One, with where it jumps to and the lines of source that it is of: the innermost, then who called it."""

    text: str
    target: str | None = None
    conditional: bool = False
    ends: bool = False
    source: Source = ()


@dataclass(frozen=True)
class Loop:
    """One main loop.

    Attributes:
        instructions: of one pass.
        barriers: of them.
        products: on the matrix units.
        macs: multiply-adds of a pass that each warp does; 0 where the instruction does not say its size.
        copies: loads that go to shared memory by themselves while the program goes on.
        loads: loads to registers.
        two_bytes: loads of two bytes, by the function that has them.
        spilled: loads and stores of spilled registers.
        wide_gathers: loads of a bitmap's kept values that are wider than one of them.
    """

    instructions: int
    barriers: int
    products: int
    macs: int
    copies: int
    loads: int
    two_bytes: dict[str, int] = field(default_factory=dict)
    spilled: int = 0
    wide_gathers: int = 0

    def per_column(self, block_m: int) -> float | None:
        """Instructions of a lane for each weight that it decodes, products included; None where none can be told."""
        return None if self.macs == 0 else self.instructions * 32 * block_m / self.macs


@dataclass(frozen=True)
class Code:
    """One kernel."""

    registers: int
    spilled: int
    loops: list[Loop]


def read_cubin(cubin: bytes) -> Code:
    """Of NVIDIA's machine code, by the tools that Triton brings."""
    used = re.search(r"REG:(\d+) STACK:(\d+)", _tool(cubin, "cuobjdump", "--dump-resource-usage"))
    if used is None:
        raise RuntimeError("cuobjdump says nothing of registers")
    return Code(int(used[1]), int(used[2]), sass_loops(_tool(cubin, "nvdisasm", "-c", "-gi")))


def sass_loops(text: str) -> list[Loop]:
    """Main loops of what ``nvdisasm -c -gi`` prints."""
    labels: dict[str, int] = {}
    code: list[Instruction] = []
    source: Source = ()
    inlined = False
    for line in text.splitlines():
        if at := re.search(r'//## File "([^"]+)", line (\d+)( inlined at)?', line):
            source = (*(source if inlined else ()), (at[1], int(at[2])))
            # the next such line is where this one was called
            inlined = bool(at[3])
        elif label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?(.*?)\s*;", line):
            text = found[2]
            jump = re.match(r"(BRA|BRX|JMP)\b.*`\((\.L\w+)\)", text)
            # a branch may have its condition among its operands, too
            conditional = bool(found[1]) or bool(jump and re.search(r"\bU?P\d", text))
            ends = bool(re.match(r"(EXIT|RET|BPT)\b", text)) and not found[1]
            code.append(Instruction(text, jump[2] if jump else None, conditional, ends, source))
    return _main_loops(code, labels)


def read_amdgcn(assembly: str) -> Code:
    """Of AMD's assembly, as Triton keeps it."""
    registers = max(map(int, re.findall(r"\.vgpr_count:\s*(\d+)", assembly)))
    spilled = sum(map(int, re.findall(r"\.vgpr_spill_count:\s*(\d+)", assembly)))
    return Code(registers, spilled, amdgcn_loops(assembly))


def amdgcn_loops(assembly: str) -> list[Loop]:
    """Main loops of AMD's assembly."""
    labels: dict[str, int] = {}
    code: list[Instruction] = []
    files: dict[str, str] = {}
    paths: dict[str, str] = {}
    source: Source = ()
    for line in assembly.splitlines():
        words, _, comment = (part.strip() for part in line.partition(";"))
        if name := re.match(r'\.file\s+(\d+)\s+(?:"([^"]*)"\s+)?"([^"]+)"', words):
            files[name[1]] = paths[Path(name[3]).name] = str(Path(name[2] or "") / name[3])
        elif at := re.match(r"\.loc\s+(\d+)\s+(\d+)", words):
            callers = re.findall(r"@\[ ([^:\s]+):(\d+)", comment)
            source = ((files.get(at[1], ""), int(at[2])), *((paths.get(own, ""), int(row)) for own, row in callers))
        elif label := re.match(r"(\.L\w+):", words):
            labels[label[1]] = len(code)
        elif re.match(r"[a-z]\w+\b", words) and not words.endswith(":"):
            jump = re.match(r"s_(c?)branch\w*\s+(\.L\w+)", words)
            ends = words.startswith("s_endpgm")
            code.append(Instruction(words, jump[2] if jump else None, bool(jump and jump[1]), ends, source))
    return _main_loops(code, labels)


def _tool(cubin: bytes, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([BIN / tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def _macs(text: str) -> int:
    for pattern, warps in _MMA.items():
        if found := pattern.match(text):
            m, n, k = map(int, found.groups())
            return m * n * k // warps
    return 0


def _main_loops(code: list[Instruction], labels: dict[str, int]) -> list[Loop]:
    loops = [
        sorted(i for block in body for i in block)
        for body in _natural_loops(code, labels)
        if any(_is_product(code[i].text) for block in body for i in block)
    ]
    innermost = [body for body in loops if not any(set(other) < set(body) for other in loops)]
    return [_describe([code[i] for i in body]) for body in innermost]


def _is_product(text: str) -> bool:
    return _macs(text) > 0 or bool(_SIZELESS.match(text))


def _describe(body: list[Instruction]) -> Loop:
    texts = [instruction.text for instruction in body]
    two_bytes: dict[str, int] = {}
    for instruction in body:
        if _TWO_BYTES.match(instruction.text):
            name = _loaded_for(instruction.source)
            two_bytes[name] = two_bytes.get(name, 0) + 1
    copies = sum(bool(_ASYNC.search(text)) for text in texts)
    loads = [own for own in body if _LOAD.match(own.text)]
    return Loop(
        len(body),
        sum(text.startswith(("BAR.", "s_barrier")) for text in texts),
        sum(map(_is_product, texts)),
        sum(map(_macs, texts)),
        copies,
        len(loads),
        two_bytes,
        sum(bool(_SPILLED.match(text)) for text in texts),
        sum(_loaded_for(own.source) == _GATHER and not _SINGLE.match(own.text) for own in loads),
    )


def _blocks(code: list[Instruction], labels: dict[str, int]) -> tuple[list[range], list[list[int]]]:
    """Basic blocks, and the blocks that each goes on to."""
    starts = {0, *labels.values()} | {i + 1 for i, own in enumerate(code) if own.target or own.ends}
    begins = sorted(start for start in starts if start < len(code))
    blocks = [range(begin, end) for begin, end in zip(begins, [*begins[1:], len(code)], strict=True)]
    goes_on: list[list[int]] = []
    for number, block in enumerate(blocks):
        last = code[block[-1]]
        after = []
        if last.target in labels and labels[last.target] < len(code):
            after.append(bisect_right(begins, labels[last.target]) - 1)
        if not last.ends and (last.target is None or last.conditional) and number + 1 < len(blocks):
            after.append(number + 1)
        goes_on.append(after)
    return blocks, goes_on


def _natural_loops(code: list[Instruction], labels: dict[str, int]) -> Iterator[list[range]]:
    """The blocks of each loop: those from which a jump back to a block that all ways lead through can be reached."""
    if not code:
        return
    blocks, goes_on = _blocks(code, labels)
    comes_from: list[list[int]] = [[] for _ in blocks]
    for number, after in enumerate(goes_on):
        for target in after:
            comes_from[target].append(number)
    dominators = _dominators(goes_on, comes_from)
    loops: dict[int, set[int]] = {}
    for number, after in enumerate(goes_on):
        for head in after:
            if head in dominators.get(number, ()):
                loops.setdefault(head, {head}).update(_reaching(number, head, comes_from))
    for body in loops.values():
        yield [blocks[number] for number in body]


def _dominators(goes_on: list[list[int]], comes_from: list[list[int]]) -> dict[int, set[int]]:
    reached, todo = {0}, [0]
    while todo:
        for target in goes_on[todo.pop()]:
            if target not in reached:
                reached.add(target)
                todo.append(target)
    found = {number: set(reached) for number in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for number in sorted(reached - {0}):
            before = [found[own] for own in comes_from[number] if own in reached]
            new = set.intersection(*before) | {number}
            if new != found[number]:
                found[number], changed = new, True
    return found


def _reaching(start: int, head: int, comes_from: list[list[int]]) -> Iterable[int]:
    """Blocks from which one is reached on ways that don't lead through the loop's head."""
    seen = {start, head}
    todo = [start] if start != head else []
    while todo:
        for before in comes_from[todo.pop()]:
            if before not in seen:
                seen.add(before)
                todo.append(before)
    return seen


def _loaded_for(source: Source) -> str:
    """The function that a load is of: the innermost, or who called it where that one loads anything."""
    names = (function_at(file, line) for file, line in source)
    return next((name for name in names if name != _ANY_LOAD), "unknown")


def function_at(file: str, line: int) -> str:
    """The function of a source file that holds a line; ``unknown`` where the code does not say."""
    # Loads are assembly of two lines, which LLVM counts: the second one's is one behind a function's last.
    known = [(begin, end, name) for begin, end, name in _functions(file) if begin <= line <= end + 1]
    return max(known)[2] if known else "unknown"


@cache
def _functions(file: str) -> list[tuple[int, int, str]]:
    if not Path(file).is_file():
        return []
    return [
        (node.lineno, node.end_lineno or node.lineno, node.name)
        for node in ast.walk(ast.parse(Path(file).read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
