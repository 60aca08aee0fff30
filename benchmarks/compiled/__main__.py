"""`python -m benchmarks.compiled`: the GPU kernels at real shapes, compiled for many cards, without one.

For each card and shape, way of coding and number of tokens, every kernel that a layer launches is compiled down to
machine code by the Triton that is installed, and looked at: shared memory within the card's, two blocks on a
multiprocessor up to 64 tokens, no spilled registers, asynchronous copies in every main loop, no plain weights loaded
two bytes at a time, instructions for each decoded weight within the committed budget. What fails and is known to stands
in allowed.json; anything worse makes the exit code 1. Nothing here is a time.

What was compiled is kept and not compiled again, so the command goes on where it was stopped. Without options those
cells are compiled that differ in what is compiled (``differs``), twenty minutes on a busy core; all of them, by naming
cards, shapes, methods and dtypes, take a night.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.arguments import count, made_folder, minutes

if TYPE_CHECKING:
    from benchmarks.compiled.matrix import Allowed, Cell

CHECKS = ("compiles", "listed", "shared", "blocks", "spills", "copies", "loads", "gathers", "instructions")
# For which all is compiled; of other cards what is usual.
WHOLE_CARD = "sm_90"
# fp32 takes no matrix units; the one with least shared memory, too.
FP32_CARDS = (WHOLE_CARD, "sm_89")
USUAL_SHAPE = "OLMoE-1B-7B"
# One for each number of experts of a token, but the usual one's.
OTHER_SHAPES = ("Mixtral-8x7B", "DeepSeekMoE-16B", "Llama-4-Scout", "Qwen3-Next-80B-A3B", "DeepSeek-V3")
# Of few tokens and of many, those whose kernels need most; and what other cards are compiled for.
ENDS = (1, 4096)
FEW_CLASSES = (1, 64, 128, 512, 4096)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    from benchmarks.compiled.cards import CARDS
    from benchmarks.compiled.layers import MATRIX_METHODS, MATRIX_SHAPES
    from benchmarks.compiled.matrix import DTYPES, TOKENS

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, choices in (("card", CARDS), ("shape", MATRIX_SHAPES), ("method", MATRIX_METHODS), ("dtype", DTYPES)):
        parser.add_argument(f"--{name}", nargs="+", choices=list(choices), metavar="NAME", help=", ".join(choices))
    parser.add_argument("--tokens", nargs="+", type=count, metavar="T", help=", ".join(map(str, TOKENS)))
    parser.add_argument(
        "--minutes", type=minutes, default=float("inf"), help="stop after this long; go on another time"
    )
    parser.add_argument("--folder", type=Path, default=Path("build/compiled"), help="keeps what was found")
    parser.add_argument("--accept", action="store_true", help="write what is found to allowed.json")
    parser.add_argument("--list", action="store_true", help="every finding, not the worst of each kind alone")
    options = parser.parse_args(argv)
    options.folder = made_folder(parser, options.folder)
    return options


def chosen(options: argparse.Namespace) -> "Iterator[Cell]":
    """The cells: all of what is named; else those that differ in what is compiled."""
    from benchmarks.compiled.cards import CARDS
    from benchmarks.compiled.layers import MATRIX_METHODS, MATRIX_SHAPES
    from benchmarks.compiled.matrix import DTYPES, TOKENS, Cell

    named = bool(options.shape or options.method or options.dtype or options.tokens)
    for card, shape, method, dtype, tokens in itertools.product(
        options.card or CARDS,
        options.shape or MATRIX_SHAPES,
        options.method or MATRIX_METHODS,
        options.dtype or (DTYPES if options.shape is None else DTYPES[:1]),
        options.tokens or TOKENS,
    ):
        cell = Cell(card, shape, method, dtype, tokens)
        if named or differs(cell):
            yield cell


def differs(cell: "Cell") -> bool:
    """Whether a cell's kernels are not, or nearly, those of others.

    Numbers of tokens fall into classes, and a class is compiled once. A shape decides how many choices a token has
    and where a row ends; its other kernels are the usual shape's. The rarer ways of coding, and fp16, are compiled for
    one card.
    """
    from benchmarks.models.synthetic_layer import CODINGS

    whole, usual, end = cell.card == WHOLE_CARD, cell.method in ("low-rank", "prune"), cell.tokens in ENDS
    if cell.dtype == "float32":
        return cell.card in FP32_CARDS and cell.shape == USUAL_SHAPE and usual and end
    if cell.dtype == "float16":
        return whole and cell.shape == USUAL_SHAPE and cell.method in CODINGS and end
    if cell.shape == USUAL_SHAPE:
        if cell.method in CODINGS:
            return whole or cell.tokens in FEW_CLASSES
        return whole and (cell.tokens <= 64 or cell.tokens in (128, 4096))
    if cell.shape not in OTHER_SHAPES or not end:
        return False
    return usual and (whole or cell.shape == OTHER_SHAPES[0])


def main(argv: list[str] | None = None) -> int:
    """Compile, print, compare; the exit code."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("benchmarks.compiled: unset TRITON_INTERPRET, which replaces the compiler", file=sys.stderr)
        return 2
    options = parse(argv)
    os.environ.setdefault("TRITON_CACHE_DIR", str(options.folder / "triton"))
    from benchmarks.compiled.matrix import Allowed, compile_cells

    cells = list(chosen(options))
    rows = []
    for row in compile_cells(cells, options.folder, time.monotonic() + 60 * options.minutes):
        rows.append(row)
        if sys.stderr.isatty():
            print(f"\r{len(rows)} of {len(cells)}", end="", file=sys.stderr, flush=True)
    allowed = Allowed.read()
    if options.accept:
        allowed.accept(rows)
    worse = report(rows, allowed, everything=options.list)
    print(f"{len(rows)} of {len(cells)} cells; {worse} findings that allowed.json does not have")
    return 1 if worse else 0


def report(rows: list[dict[str, Any]], allowed: "Allowed", *, everything: bool) -> int:
    """Print a table for each card and what is not as it should be; the number of findings that are not known."""
    from benchmarks.compiled.cards import CARDS
    from benchmarks.compiled.matrix import excesses

    count = 0
    for name, card in CARDS.items():
        own = [row for row in rows if row["card"] == name]
        if not own:
            continue
        print(
            f"\n{name} ({card.sold_as}), {card.block_bytes} bytes of shared memory a block, triton {own[0]['triton']}"
        )
        print(f"{'method':20} {'T':4} {'kernel':13} {'shared':>7} {'blocks':>6} {'regs':>5} {'spilled':>7} "
              f"{'no copy':>7} {'2-byte':>6} {'instr/col':>9}")  # fmt: skip
        for line in table(own):
            print(line)
        found = [one for row in own for one in excesses(row, allowed.budget)]
        for check in CHECKS:
            listed = sorted((one for one in found if one.check == check), key=lambda one: -one.value)
            worse = [one for one in listed if allowed.worse(one)]
            count += len(worse)
            if listed:
                print(f"  {check}: {len(listed)} findings, {len(worse)} not known; the worst:")
            shown = listed if everything else [*worse[:5], *[one for one in listed if one not in worse][:2]]
            for one in shown:
                print(f"    {'WORSE' if allowed.worse(one) else 'known'} {one.key}, {one.words}")
    return count


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The worst of each method, strategy and kernel over shapes, dtypes and tokens."""
    from benchmarks.compiled.cards import CARDS
    from benchmarks.compiled.matrix import GATHERS, cell_of, loops_of, per_column

    kernels: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        for name, kernel in row["kernels"].items():
            if "error" not in kernel:
                kernels.setdefault((cell_of(row).coded.split()[1], cell_of(row).few, name), []).append(kernel)
    card = CARDS[rows[0]["card"]]
    for (method, few, name), own in kernels.items():
        loops = [loop for kernel in own for loop in loops_of(kernel)]
        if not loops:
            continue
        columns = [value for value in map(per_column, own) if value is not None]
        fit = min(card.blocks(kernel["shared"], kernel["registers"], kernel["warps"]) for kernel in own)
        plain = max(sum(n for by, n in loop.two_bytes.items() if by not in GATHERS) for loop in loops)
        yield (
            f"{method:20} {few:4} {name:13} {max(k['shared'] for k in own):7} {fit:6} "
            f"{max(k['registers'] for k in own):5} {max(k['spilled'] for k in own):7} "
            f"{sum(not loop.copies for loop in loops) if not card.amd else '-':>7} {plain:6} "
            f"{f'{max(columns):.1f}' if columns else '-':>9}"
        )


if __name__ == "__main__":
    sys.exit(main())
