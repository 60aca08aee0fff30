"""Compiles every cell of the matrix, keeps what was found, and holds it against what is known and allowed."""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import triton

from benchmarks.compiled.cards import CARDS, Card
from benchmarks.compiled.layers import MATRIX_SHAPES, matrix_call, matrix_layer
from benchmarks.compiled.machine_code import Loop, read_amdgcn, read_cubin
from benchmarks.compiled.recorder import Launch, recorded
from benchmarks.harness.environment import REPO

TOKENS = (1, 4, 16, 64, 65, 128, 512, 2048, 4096)
DTYPES = ("bfloat16", "float16", "float32")
# Up to here weights are what a layer waits for, and a lone block on a multiprocessor can't hide that.
FEW_TOKENS = 64
# Loads of two bytes that are single values by nature: kept values of a bitmap, scales, and a row's pointer to its kept
# values, of which a step has one for 64 columns.
GATHERS = frozenset({"_kept_column", "_octet_scales", "_step_scales", "kept_before"})
# The assembler gives one or two loads of a loop the line of another one.
MISNAMED = 2
# what is written of a finding that nobody has looked at
UNSAID = "not looked at yet"
TOLERANCE = 1.05
HERE = Path(__file__).parent
ALLOWED = HERE / "allowed.json"


@dataclass(frozen=True)
class Cell:
    """One compiled call."""

    card: str
    shape: str
    method: str
    dtype: str
    tokens: int

    @property
    def few(self) -> str:
        """Which of the two strategies it is."""
        return "few" if self.tokens <= FEW_TOKENS else "many"

    @property
    def coded(self) -> str:
        """Card and way of coding, how keys begin; fp32, which takes no matrix units, has keys of its own."""
        return f"{self.card} {self.method}{'/fp32' if self.dtype == 'float32' else ''} "

    def key(self, kernel: str) -> str:
        """What a kernel's findings and its budget are kept by."""
        return f"{self.coded}{kernel} {self.few}"


@dataclass(frozen=True)
class Excess:
    """Something that is not as it should be.

    Attributes:
        check: one of ``CHECKS`` of the command.
        key: card, method, kernel, few or many tokens.
        value: how bad; larger is worse.
        words: for the table.
    """

    check: str
    key: str
    value: float
    words: str


@cache
def sources_hash() -> str:
    """Of everything that decides what is found; another one makes rows worthless."""
    own = [HERE / f"{name}.py" for name in ("layers", "machine_code", "recorder")]
    files = [*sorted((REPO / "resmoe_vllm" / "kernels" / "gpu").glob("*.py")), *own]
    text = b"".join(path.read_bytes() for path in files) + triton.__version__.encode()
    return hashlib.sha256(text).hexdigest()[:16]


def by_label(launches: Iterable[Launch]) -> dict[str, Launch]:
    """A call's kernels, each once, named by what they are launched for; numbered where that takes several."""
    kernels: dict[str, dict[str, Launch]] = {}
    for launch in launches:
        identity = launch.error if launch.compiled is None else launch.compiled.hash
        kernels.setdefault(launch.role, {}).setdefault(identity, launch)
    return {
        f"{role}.{number}" if len(own) > 1 else role: launch
        for role, own in kernels.items()
        for number, launch in enumerate(own.values(), 1)
    }


class Analyst:
    """Reads machine code; each kernel once, as many cells share it.

    Args:
        folder: where findings are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, launch: Launch) -> dict[str, Any]:
        """One launch as rows hold it."""
        kernel = launch.compiled
        if kernel is None:
            return {"error": launch.error}
        file = self._folder / f"{kernel.hash}.json"
        if not file.exists():
            cubin = kernel.asm.get("cubin")
            code = read_cubin(cubin) if cubin is not None else read_amdgcn(kernel.asm["amdgcn"])
            found = {"shared": kernel.metadata.shared, **asdict(code)}
            file.write_text(json.dumps(found))
        return json.loads(file.read_text()) | {"block_m": launch.block_m, "warps": launch.warps}


def compile_cells(cells: Iterable[Cell], folder: Path, deadline: float) -> Iterator[dict[str, Any]]:
    """Rows of cells, those that were compiled before first; stops at the deadline and leaves the others out."""
    cells = list(cells)
    folder.mkdir(parents=True, exist_ok=True)
    done = read_rows(folder)
    yield from (done[cell] for cell in cells if cell in done)
    analyst = Analyst(folder / "kernels" / sources_hash())
    bound: tuple[Any, ...] = ()
    kernel = None
    with (folder / "rows.jsonl").open("a") as file:
        for cell in cells:
            if cell in done:
                continue
            if time.monotonic() > deadline:
                return
            shape = MATRIX_SHAPES[cell.shape]
            # a layer keeps what was compiled for it, so each card has its own
            if bound != (cell.card, cell.shape, cell.method, cell.dtype):
                kernel = matrix_layer(shape, cell.method, cell.dtype)
                bound = (cell.card, cell.shape, cell.method, cell.dtype)
            began = time.monotonic()
            with recorded(CARDS[cell.card], compile_kernels=True) as launches:
                matrix_call(kernel, shape, cell.tokens, cell.dtype)
            found = {label: analyst.read(launch) for label, launch in by_label(launches).items()}
            row = {
                **asdict(cell),
                "triton": triton.__version__,
                "sources": sources_hash(),
                "seconds": round(time.monotonic() - began, 1),
                "kernels": found,
            }
            file.write(json.dumps(row) + "\n")
            file.flush()
            yield row


def read_rows(folder: Path) -> dict[Cell, dict[str, Any]]:
    """What was found before, by the same kernels and the same compiler."""
    file = folder / "rows.jsonl"
    if not file.exists():
        return {}
    lines = file.read_text().splitlines()
    # the last line may be cut where the process was killed
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {cell_of(row): row for row in rows if row["sources"] == sources_hash()}


def cell_of(row: dict[str, Any]) -> Cell:
    """The cell of a row."""
    return Cell(*(row[name] for name in Cell.__dataclass_fields__))


def loops_of(kernel: dict[str, Any]) -> list[Loop]:
    """Main loops of a row's kernel."""
    return [Loop(**loop) for loop in kernel["loops"]]


def per_column(kernel: dict[str, Any]) -> float | None:
    """Of its worst loop; None where the code does not say."""
    if kernel["block_m"] is None:
        return None
    known = [loop.per_column(kernel["block_m"]) for loop in loops_of(kernel)]
    return max((value for value in known if value is not None), default=None)


def excesses(row: dict[str, Any], budget: dict[str, float | None]) -> Iterator[Excess]:
    """Everything in a row that is not as it should be."""
    cell = cell_of(row)
    card = CARDS[cell.card]
    for name, kernel in row["kernels"].items():
        key = cell.key(name)
        where = f"{cell.shape} {cell.dtype} T={cell.tokens}"
        if "error" in kernel:
            yield Excess("compiles", key, 1, f"{where}: {kernel['error']}")
            continue
        if key not in budget:
            yield Excess("listed", key, 1, f"{where}: a kernel that allowed.json does not have")
        yield from _resources(cell, card, key, where, kernel)
        for loop in loops_of(kernel):
            if not loop.copies and not card.amd:
                yield Excess("copies", key, 1, f"{where}: a loop of {loop.instructions} has no asynchronous copy")
            if loop.wide_gathers > MISNAMED:
                words = f"{where}: {loop.wide_gathers} loads of several kept values at once, of which one is right"
                yield Excess("gathers", key, loop.wide_gathers, words)
            plain = {own: count for own, count in loop.two_bytes.items() if own not in GATHERS}
            if sum(plain.values()) > MISNAMED:
                words = ", ".join(f"{count} in {own}" for own, count in plain.items())
                yield Excess("loads", key, sum(plain.values()), f"{where}: 2-byte loads: {words}")
        value = per_column(kernel)
        allowed = budget.get(key)
        if value is not None and allowed is not None and value > TOLERANCE * allowed:
            yield Excess(
                "instructions", key, value, f"{where}: {value:.1f} instructions a column, {allowed:.1f} allowed"
            )


def _resources(cell: Cell, card: Card, key: str, where: str, kernel: dict[str, Any]) -> Iterator[Excess]:
    shared, registers, warps = kernel["shared"], kernel["registers"], kernel["warps"]
    if shared > card.block_bytes:
        yield Excess("shared", key, shared, f"{where}: {shared} bytes of shared memory, a block has {card.block_bytes}")
    blocks = card.blocks(shared, registers, warps)
    if cell.tokens <= FEW_TOKENS and blocks < 2 and kernel["loops"]:
        words = f"{shared} bytes, {registers} registers"
        yield Excess("blocks", key, 2 - blocks, f"{where}: {blocks} blocks a multiprocessor ({words})")
    if kernel["spilled"]:
        inside = sum(loop.spilled for loop in loops_of(kernel))
        words = (
            f"{kernel['spilled']} bytes of registers spilled, {inside or 'no'} loads and stores of them in main loops"
        )
        yield Excess("spills", key, kernel["spilled"], f"{where}: {words}")


@dataclass
class Allowed:
    """What is committed.

    Attributes:
        budget: by key the instructions a column, None where the machine code does not say how large a product is.
            A key that is not in it was never looked at.
        known: by check and key the excesses that are known.
        why: by check and key why they are left.
    """

    budget: dict[str, float | None]
    known: dict[str, dict[str, float]]
    why: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def read(cls) -> "Allowed":
        """From the repository."""
        if not ALLOWED.exists():
            return cls({}, {})
        found = json.loads(ALLOWED.read_text())
        budget: dict[str, float | None] = {}
        for of, kernels in found["budget"].items():
            *cell, few = of.split()
            budget |= {" ".join((*cell, name, few)): value for name, value in kernels.items()}
        allowed = cls(dict(sorted(budget.items())), {})
        for one in found["known"]:
            allowed.known.setdefault(one["check"], {}).update(one["most"])
            allowed.why.setdefault(one["check"], {}).update(dict.fromkeys(one["most"], one["why"]))
        return allowed

    def text(self) -> str:
        """As it is committed: a line for each card, way of coding and strategy, and for each known finding."""
        kernels: dict[str, dict[str, float | None]] = {}
        for key, value in sorted(self.budget.items()):
            card, method, name, few = key.split()
            kernels.setdefault(f"{card} {method} {few}", {})[name] = value
        lines = [f"  {json.dumps(of)}: {json.dumps(own)}" for of, own in sorted(kernels.items())]
        reasons: dict[tuple[str, str], dict[str, float]] = {}
        for check, own in sorted(self.known.items()):
            for key, value in sorted(own.items()):
                reasons.setdefault((check, self.why.get(check, {}).get(key, UNSAID)), {})[key] = value
        known = []
        for (check, why), most in sorted(reasons.items()):
            values = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in most.items())
            head = f'   "check": {json.dumps(check)},\n   "why": {json.dumps(why)}'
            known.append(f'  {{\n{head},\n   "most": {{\n{values}\n   }}\n  }}')
        return "\n".join(
            (
                "{",
                ' "budget": {',
                ",\n".join(lines),
                " },",
                ' "known": [',
                *([",\n".join(known)] if known else []),
                " ]",
                "}",
                "",
            )
        )

    def worse(self, found: Excess) -> bool:
        """Not known, or not so bad."""
        return found.value > self.known.get(found.check, {}).get(found.key, 0)

    def accept(self, rows: list[dict[str, Any]]) -> None:
        """Replace what is said of these rows' keys by what they show, and write it."""
        seen = {cell_of(row).coded for row in rows}
        sizes: dict[str, float | None] = {}
        for row in rows:
            for name, kernel in row["kernels"].items():
                if "error" in kernel:
                    continue
                key, value = cell_of(row).key(name), per_column(kernel)
                most = sizes.get(key)
                sizes[key] = most if value is None else max(round(value, 2), most or 0)
        kept = {key: value for key, value in self.budget.items() if not key.startswith(tuple(seen))}
        self.budget = dict(sorted((kept | sizes).items()))
        known: dict[str, dict[str, float]] = {
            check: {key: value for key, value in own.items() if not key.startswith(tuple(seen))}
            for check, own in self.known.items()
        }
        for row in rows:
            for found in excesses(row, self.budget):
                own = known.setdefault(found.check, {})
                own[found.key] = max(found.value, own.get(found.key, 0))
        self.known = {check: dict(sorted(own.items())) for check, own in sorted(known.items()) if own}
        self.why = {
            check: {key: self.why.get(check, {}).get(key, UNSAID) for key in own} for check, own in self.known.items()
        }
        ALLOWED.write_text(self.text())
