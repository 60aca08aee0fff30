"""Which low-rank candidates of a large layer are worth factorising for: by spectra, before any is measured.

Factorising takes most of the planning of a large layer. What low rank loses at the least is the energy beyond its
rank, times what its codes lose of a remainder; a candidate that loses more even so than codes alone of the same bytes,
in every projection, is left out. Spectra are of few rows, at the same rank: that makes low rank look better.
"""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress_tools.format.schema import LowRankResidual, Projection, ResidualPart
from compress_tools.numerics.parallel import in_parallel
from compress_tools.numerics.sampling import spaced
from compress_tools.planner.candidates import Coder, Sizes
from compress_tools.planner.measure import LOW_RANK_EXPERTS, LayerMeasurement
from compress_tools.source.design_matrix import design_to_rows

SPECTRUM_ROWS = 1024

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def worth_factorising(
    coders: Iterable[Coder], measured: LayerMeasurement, design: Tensor, sizes: Sizes, layer_budget: float, workers: int
) -> tuple[Coder, ...]:
    """The low-rank coders that could be better than codes alone somewhere.

    Args:
        coders: low rank, perhaps with codes of the remainder.
        measured: the layer's other candidates, without a center.
        design: design matrices ``[E, I, P*H]``.
        sizes: of the model.
        layer_budget: bytes of the layer if all had the same.
        workers: experts side by side.
    """
    tails = _tails(design, sizes.projections, workers)
    curves = {p: _codes_curve(measured, sizes, number) for number, p in enumerate(sizes.projections)}
    # What is smaller than the smallest codes is needed only where these hardly fit.
    tight = layer_budget < 2 * sizes.num_experts * sum(float(curve[0][0]) for curve in curves.values())

    def could_win(group: tuple[Projection, ...], parts: tuple[ResidualPart, ...]) -> bool:
        factors = parts[0]
        if not isinstance(factors, LowRankResidual):
            return True
        nbytes = sizes.expert(parts) / len(group)
        left = float(tails[group][min(factors.rank, len(tails[group]) - 1)])
        codes = _codes_share(measured, sizes, parts[1], group) if len(parts) > 1 else 1.0
        if nbytes < min(float(curves[p][0][0]) for p in group):
            return tight
        return left * codes < sum(float(np.interp(nbytes, *curves[p])) for p in group) / len(group)

    kept = []
    for coder in coders:
        groups = [sizes.projections] if coder.joint else [(p,) for p in sizes.projections]
        if any(could_win(group, coder.parts(group, sizes.rows, sizes.hidden_size)) for group in groups):
            kept.append(coder)
    return tuple(kept)


def _tails(
    design: Tensor, projections: tuple[Projection, ...], workers: int
) -> dict[tuple[Projection, ...], NDArray[np.float64]]:
    """Share of the energy beyond each rank, of each projection and of all together, at the least over some experts."""
    rows = torch.tensor(spaced(list(range(design.shape[1])), SPECTRUM_ROWS), device=design.device)

    def of(expert: int) -> list[NDArray[np.float64]]:
        own = design_to_rows(design[expert][rows].float(), projections)
        grams = [own[p] @ own[p].T for p in projections]
        return [_tail(gram) for gram in [*grams, torch.stack(grams).sum(0)]]

    found = in_parallel(of, spaced(list(range(len(design))), LOW_RANK_EXPERTS), workers)
    least = [np.minimum.reduce(each) for each in zip(*found, strict=True)]
    return dict(zip([*((p,) for p in projections), projections], least, strict=True))


def _tail(gram: Tensor) -> NDArray[np.float64]:
    """Of the eigenvalues: by rank, what lies beyond it, ``[n + 1]`` from 1 to 0."""
    values = torch.linalg.eigvalsh(gram.double()).clamp(min=0).flip(0).cpu().numpy()
    total = max(float(values.sum()), 1e-300)
    return 1 - np.concatenate([[0.0], np.cumsum(values)]) / total


def _shares(measured: LayerMeasurement, coder: Coder) -> Tensor:
    """What a coder loses of each projection's energy, ``[P]``."""
    return measured.errors[0, coder].sum(0) / measured.energies.sum(0).clamp_min(1e-300)


def _codes_curve(measured: LayerMeasurement, sizes: Sizes, number: int) -> Curve:
    """Bytes of an expert and share that is lost, of the codes of one projection: the least at so many bytes."""
    group = (sizes.projections[number],)
    points = sorted(
        (sizes.expert(coder.parts(group, sizes.rows, sizes.hidden_size)), float(_shares(measured, coder)[number]))
        for _, coder in measured.errors
        if not coder.joint
    )
    best = np.minimum.accumulate([share for _, share in points])
    return np.array([float(nbytes) for nbytes, _ in points]), best


def _codes_share(measured: LayerMeasurement, sizes: Sizes, part: ResidualPart, group: tuple[Projection, ...]) -> float:
    """What the codes of a remainder lose of it, as they lose of weights; nothing where that was not measured."""
    for _, coder in measured.errors:
        own = coder.parts(group, sizes.rows, sizes.hidden_size)
        if not coder.joint and own[0] == part:
            numbers = [sizes.projections.index(p) for p in group]
            return float(_shares(measured, coder)[numbers].min())
    return 0.0
