"""`python -m benchmarks.coders`: what plain and trellis codes lose, on rows made here.

Relative squared errors of rows whose distribution is known, all bits counted. How fast trellis codes are found is
measured by `benchmarks.compress`.
"""

from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks.harness.rows import Row, print_rows, write_rows
from compress_tools.format.packing import pack_codes
from compress_tools.format.parts.base import GroupSize
from compress_tools.format.quantization import dequantize
from compress_tools.format.row_sizes import code_row_bytes, num_groups
from compress_tools.numerics.parallel import one_thread_each
from compress_tools.residuals.quantizer import quantize_rows
from compress_tools.residuals.trellis import restored_rows, trellis_rows

COLUMNS = 2048
GROUPS: tuple[GroupSize | None, ...] = (None, 128, 32)


def student(shape: tuple[int, int]) -> Tensor:
    """Of five degrees of freedom."""
    return torch.distributions.StudentT(5.0).sample(torch.Size(shape))


def laplace(shape: tuple[int, int]) -> Tensor:
    """Twice as many large values as a gaussian has, and larger ones."""
    return torch.distributions.Laplace(0.0, 1.0).sample(torch.Size(shape))


TAILS: dict[str, Callable[[tuple[int, int]], Tensor]] = {
    "gaussian": torch.randn,
    "laplace": laplace,
    "student": student,
}


def plain(matrix: Tensor, bits: int, group_size: int | None) -> Tensor:
    """Plain codes, restored."""
    codes, scales = quantize_rows(matrix, bits, group_size)
    return dequantize(pack_codes(codes, bits), scales, bits, matrix.shape[1], group_size)


def trellis(matrix: Tensor, bits: int, group_size: int | None) -> Tensor:
    """Trellis codes, restored."""
    symbols, scales = trellis_rows(matrix, bits, group_size)
    return restored_rows(symbols, scales, bits, matrix.shape[1], group_size)


CODERS = {"plain codes": (plain, (2, 3, 4, 8)), "trellis": (trellis, (1, 2, 3, 4))}


def measure(matrix: Tensor, tails: str, coder: str, bits: int, group_size: GroupSize | None) -> Row:
    """Error of one coder on one matrix."""
    code, _ = CODERS[coder]
    found = code(matrix, bits, group_size)
    stored = code_row_bytes(bits, COLUMNS) + 2 * num_groups(COLUMNS, group_size)
    about = {"rows": len(matrix), "columns": COLUMNS, "bits_a_weight": 8 * stored / COLUMNS}
    name = f"{tails}, {coder}, {bits} bits by {group_size or 'row'}"
    error = float((matrix - found).square().sum() / matrix.square().sum())
    return Row(f"{name}: relative squared error", error, context=about)


@click.command(help=__doc__)
@click.option("--rows", type=click.IntRange(min=1), default=128, show_default=True, help="Of each matrix.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows to FILE.")
def main(rows: int, json_file: Path | None) -> None:
    """Measure, print, write."""
    found: list[Row] = []
    with one_thread_each():
        for tails, draw in TAILS.items():
            torch.manual_seed(0)
            matrix = draw((rows, COLUMNS))
            for coder, (_, widths) in CODERS.items():
                for bits in widths:
                    for group_size in GROUPS:
                        found.append(measure(matrix, tails, coder, bits, group_size))
    print_rows(found, "codes of rows")
    if json_file is not None:
        write_rows(found, json_file)


if __name__ == "__main__":
    main()
