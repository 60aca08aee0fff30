"""The same barycenters by POT's own free-support solver: objective and time."""

import time
import warnings
from dataclasses import dataclass

import numpy as np
import ot
import torch

from compress_tools.center.barycenter import barycenter
from compress_tools.numerics.work import Work

# E, I, D, kind. From about 2048 rows on, POT's solver stops at its pivot cap and only warns.
CASES = (
    (4, 256, 64, "unrelated"),
    (4, 512, 192, "unrelated"),
    (4, 1024, 192, "unrelated"),
    (4, 1024, 192, "near-copied"),
    (2, 2048, 192, "unrelated"),
)


@dataclass(frozen=True)
class Comparison:
    """One input, two solvers: ``objective = sum_k ||T_k W_k - center||_F^2``, the sum over ``experts`` of them."""

    experts: int
    rows: int
    columns: int
    kind: str
    our_objective: float
    our_s: float
    pot_objective: float
    pot_s: float
    pot_truncated: bool


def compare(experts: int, rows: int, columns: int, kind: str, workers: int, seed: int = 0) -> Comparison:
    """Run both on one random input; POT from expert 0, to its own default stop, with 25 iterations at most."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(0.3 * torch.randn(experts, rows, 1, generator=generator))
    design = scale * torch.randn(experts, rows, columns, generator=generator)
    if kind == "near-copied":
        design = design[:1] + 0.35 * design
    start = time.perf_counter()
    ours = barycenter(design, work=Work(workers))
    our_s = time.perf_counter() - start
    clouds = [expert.double().numpy() for expert in design]
    masses = [np.full(rows, 1 / rows)] * experts
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        support = ot.lp.free_support_barycenter(clouds, masses, clouds[0].copy(), numItermax=25)
    pot_s = time.perf_counter() - start
    # POT returns points alone: each is scored by an exact assignment of every expert to them.
    score = rows * sum(ot.emd2(masses[0], masses[0], ot.dist(support, cloud), numItermax=2**62) for cloud in clouds)
    truncated = any("numItermax" in str(warning.message) for warning in caught)
    return Comparison(experts, rows, columns, kind, ours.objective[-1], our_s, float(score), pot_s, truncated)
