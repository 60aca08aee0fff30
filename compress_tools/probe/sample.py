"""The experts that a probe looks at: whole where that is quick, otherwise a sample of rows matched across experts."""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from compress_tools.numerics.sampling import choose

# Up to here every row takes part. Above, an exact alignment of all rows would take minutes for each expert.
MAX_WHOLE_ROWS = 2048
SAMPLED_ROWS = 1024
_MATCH_COLUMNS = 2048

ReadExpert = Callable[[int], Tensor]


@dataclass(frozen=True)
class ExpertSample:
    """Sampled experts of a layer, n of them.

    Attributes:
        design: ``[n, rows, D]`` fp32, to be aligned; rows of later experts were picked to match expert 0's.
        unaligned: ``[n, rows, D]`` fp32, the same row numbers of every expert; ``design`` itself for whole experts.
        row_norms: ``[n, I]`` fp32 on the CPU, of all rows.
    """

    design: Tensor
    unaligned: Tensor
    row_norms: Tensor


def sample_experts(read: ReadExpert, count: int, rows: Tensor | None, columns: Tensor, device: str) -> ExpertSample:
    """Read experts one at a time and keep what the probe needs.

    Args:
        read: number -> design matrix ``[I, D]`` fp32.
        count: n.
        rows: row numbers of expert 0 to keep, int64; None keeps every row of every expert.
        columns: column numbers by which rows are compared, int64; unused for whole experts.
        device: where the result lies.
    Returns:
        the sample. Each expert offers two sets of rows, the same numbers and the nearest by cosine out of all its
        rows; the set with the larger inner product with expert 0 is kept.
    """
    design, unaligned, norms = [], [], []
    for number in range(count):
        expert = read(number).to(device)
        norms.append(expert.norm(dim=1).cpu())
        if rows is None:
            design.append(expert)
            continue
        same = expert[rows.to(device)]
        unaligned.append(same)
        if number == 0:
            design.append(same)
            continue
        nearest = expert[nearest_rows(design[0][:, columns], expert[:, columns]).to(device)]
        design.append(max(same, nearest, key=lambda found: (found * design[0]).sum(dtype=torch.float64).item()))
    whole = torch.stack(design)
    return ExpertSample(whole, torch.stack(unaligned) if unaligned else whole, torch.stack(norms))


def nearest_rows(reference: Tensor, candidates: Tensor) -> Tensor:
    """For each reference row the candidate of largest cosine; no candidate twice, the surest pairs choose first.

    Args:
        reference: ``[m, C]`` fp32.
        candidates: ``[I, C]`` fp32, I >= m.
    Returns:
        ``[m]`` int64 on the CPU.
    """
    cosine = torch.nn.functional.normalize(reference) @ torch.nn.functional.normalize(candidates).T
    cosine = cosine.cpu()
    chosen = torch.empty(len(reference), dtype=torch.int64)
    for row in cosine.amax(1).argsort(descending=True).tolist():
        chosen[row] = cosine[row].argmax()
        cosine[:, chosen[row]] = -torch.inf
    return chosen


def random_experts(row_norms: Tensor, num_columns: int, seed: int) -> ReadExpert:
    """Unrelated experts of the same shape: independent gaussian entries, rows scaled to expected norms ``[n, I]``."""

    def read(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number + 1)
        entries = torch.randn(row_norms.shape[1], num_columns, generator=generator)
        return entries * (row_norms[number] / sqrt(num_columns))[:, None]

    return read


def comparison_columns(num_columns: int, seed: int) -> Tensor:
    """The columns by which rows are compared: at most 2048."""
    return choose(num_columns, min(num_columns, _MATCH_COLUMNS), seed)
