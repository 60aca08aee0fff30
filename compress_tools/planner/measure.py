"""Squared error of every candidate on the real weights of one layer, by the coders that write the checkpoint.

A layer of at most ``measure_experts`` experts of at most ``measure_rows`` rows is measured as it would be written. Of
a larger one evenly spaced experts and rows are, scaled up by the residual's energy, which is taken of all. Low rank
takes all rows, since a rank means nothing on some of them, of few experts: factorising is what takes longest. What
trellis codes of large matrices lose is predicted for some of the rows, and set right by a search on few of them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from compress_tools.center.barycenter import CenterResult
from compress_tools.format.codec import restore_center
from compress_tools.format.parts.base import Rows
from compress_tools.format.quantization import expand_scales, half_range
from compress_tools.format.schema import LayerSpec, Projection, QuantizedResidual, ResidualPart
from compress_tools.importance import Importance, LayerImportance
from compress_tools.numerics.parallel import in_parallel
from compress_tools.numerics.products import squared_norm
from compress_tools.numerics.sampling import spaced
from compress_tools.planner.candidates import CenterBits, Coder, center_parts
from compress_tools.residuals.quantizer import quantize_rows
from compress_tools.residuals.registry import encode_center, encode_part
from compress_tools.residuals.trellis import predicted_errors, restored_rows, trellis_rows
from compress_tools.source.design_matrix import design_to_rows, rows_to_design

# Of a layer that is not measured as a whole.
LOW_RANK_EXPERTS = 2
# Rows of one expert in trellis codes: all are searched of matrices of so few weights; of others so many are predicted
# and so many searched.
TRELLIS_WEIGHTS = 1 << 13
TRELLIS_PREDICTED = 64
TRELLIS_SEARCHED = 8


@dataclass(frozen=True)
class LayerMeasurement:
    """One layer's candidates.

    Attributes:
        errors: by (center bits, coder) the squared error, float64 ``[E, P]``.
        residuals: by center bits the residual's energy, center as stored, float64 ``[E, P]``.
        energies: the weights' energy, float64 ``[E, P]``.
        exact: everything was measured, nothing scaled up.
    """

    errors: dict[tuple[CenterBits, Coder], Tensor]
    residuals: dict[CenterBits, Tensor]
    energies: Tensor
    exact: bool

    def joined(self, other: "LayerMeasurement") -> "LayerMeasurement":
        """These candidates and others of the same layer."""
        return LayerMeasurement(
            self.errors | other.errors, self.residuals | other.residuals, self.energies, self.exact and other.exact
        )


@dataclass(frozen=True)
class Sample:
    """How much of a layer is measured: at most so many experts and rows, 0 for all; and what coding depends on."""

    experts: int
    rows: int
    dtype: torch.dtype
    seed: int
    workers: int


def measure_layer(
    design: Tensor,
    found: CenterResult,
    projections: tuple[Projection, ...],
    coders: Iterable[Coder],
    sample: Sample,
    advance: Callable[[], None] = lambda: None,
    importance: LayerImportance | None = None,
) -> LayerMeasurement:
    """Measure one layer.

    Args:
        design: design matrices ``[E, I, P*H]``.
        found: the center, full precision, and the alignment; without a center only coders without one are measured.
        projections: P, in design-matrix order.
        coders: the menu.
        sample: how much of the layer.
        advance: called after each expert.
        importance: what errors count; then every error and energy is a sum of squares times that.
    """
    coders = tuple(coders)
    num_experts, num_rows = design.shape[:2]
    experts = spaced(list(range(num_experts)), sample.experts or num_experts)
    rows = torch.tensor(spaced(list(range(num_rows)), sample.rows or num_rows))
    of_center = None if importance is None else importance.center
    centers = _stored_centers(design, found, projections, coders, sample.dtype, of_center)

    def counts(expert: int) -> Importance | None:
        return None if importance is None else importance.expert(expert).permuted(found.perm[expert])

    def aligned(expert: int) -> Rows:
        return design_to_rows(design[expert][found.perm[expert].to(design.device)].float(), projections)

    def energies(expert: int) -> list[list[float]]:
        own, counted = aligned(expert), counts(expert)
        wanted = [own, *({p: own[p] - center[p] for p in projections} for center in centers.values())]
        return [[_energy(matrices[p], p, counted) for p in projections] for matrices in wanted]

    def errors_of(some: tuple[Coder, ...], expert: int) -> list[list[float]]:
        own, found_errors = aligned(expert), []
        for bits, center in centers.items():
            residual = {p: own[p] - center[p] for p in projections}
            measured = _ExpertErrors(residual, rows, sample.dtype, sample.seed, counts(expert))
            found_errors += [measured.of(coder) for coder in some if bits in coder.centers]
        advance()
        return found_errors

    energy = torch.tensor(in_parallel(energies, range(num_experts), sample.workers), dtype=torch.float64)
    residuals = {bits: energy[:, 1 + number] for number, bits in enumerate(centers)}  # [E, P]
    exact = len(experts) == num_experts and len(rows) == num_rows
    low_rank = tuple(coder for coder in coders if coder.factorises)
    others = tuple(coder for coder in coders if not coder.factorises)
    errors: dict[tuple[CenterBits, Coder], Tensor] = {}
    for some, taken in ((others, experts), (low_rank, experts if exact else spaced(experts, LOW_RANK_EXPERTS))):
        keys = [(bits, coder) for bits in centers for coder in some if bits in coder.centers]
        if keys:
            found_errors = in_parallel(partial(errors_of, some), taken, sample.workers)
            measured = torch.tensor(found_errors, dtype=torch.float64)  # [S, candidates, P]
            errors |= {
                key: _scaled_up(measured[:, number], taken, residuals[key[0]]) for number, key in enumerate(keys)
            }
    searched = not any("trellis" in coder.config.method for coder in coders) or _searched_whole(
        design[0].numel() // len(projections)
    )
    return LayerMeasurement(errors, residuals, energy[:, 0], exact and searched)


def _searched_whole(weights: int) -> bool:
    """Whether trellis codes of a matrix of so many weights are searched in full."""
    return weights <= TRELLIS_WEIGHTS


def _stored_centers(
    design: Tensor,
    found: CenterResult,
    projections: tuple[Projection, ...],
    coders: tuple[Coder, ...],
    dtype: torch.dtype,
    importance: Importance | None,
) -> dict[CenterBits, Rows]:
    """Each center as a checkpoint would hold it, fp32 ``[I, H]`` by projection; zeros for none."""
    hidden_size = design.shape[2] // len(projections)
    centers: dict[CenterBits, Rows] = {}
    for bits in sorted({bits for coder in coders for bits in coder.centers}):
        if not bits:
            centers[bits] = dict.fromkeys(projections, torch.zeros((), device=design.device))
        elif found.center is not None:
            some = LayerSpec.model_construct(
                center=center_parts(bits, projections), residual=(_covering(projections),), groups=None
            )
            stored = encode_center(some, found.center, dtype, importance=importance)
            restored = restore_center(some, stored, hidden_size)
            whole = rows_to_design({p: restored[p] for p in projections}).to(design.device)
            centers[bits] = design_to_rows(whole, projections)
    return centers


def _covering(projections: tuple[Projection, ...]) -> ResidualPart:
    """Any residual of these projections: what tells ``encode_center`` the design's columns."""
    return QuantizedResidual(projections=projections, bits=2)


def _scaled_up(measured: Tensor, experts: list[int], residuals: Tensor) -> Tensor:
    """Errors of all experts ``[E, P]`` from those of some ``[S, P]``: the rest at the same share of their energy."""
    energy = residuals[experts].sum(0)
    share = measured.sum(0) / energy.clamp_min(torch.finfo(torch.float64).tiny)
    total = residuals * share
    total[experts] = measured
    return total


def _energy(matrix: Tensor, projection: Projection, importance: Importance | None) -> float:
    """Squares, each times what it counts."""
    return squared_norm(matrix if importance is None else importance.weighed(projection, matrix))


def _some(count: int, most: int) -> Tensor:
    return torch.tensor(spaced(list(range(count)), most))


class _ExpertErrors:
    """Errors of one expert's residual against one center; factors that neighbouring candidates share are kept.

    Args:
        residual: fp32 ``[I, H]`` by projection.
        rows: indices of the rows to measure.
        dtype: of stored values.
        seed: of randomised steps.
        importance: what errors count, in the order of the residual's rows; None where all count alike.
    """

    def __init__(
        self, residual: Rows, rows: Tensor, dtype: torch.dtype, seed: int, importance: Importance | None
    ) -> None:
        self._residual, self._rows, self._dtype, self._seed = residual, rows, dtype, seed
        self._all = len(rows) == len(next(iter(residual.values())))
        # The last factors of each group of projections and what they left: candidates of equal factors are neighbours.
        self._after_low_rank: dict[tuple[Projection, ...], tuple[ResidualPart, Rows]] = {}
        self._importance = importance
        self._sampled_importance = None if importance is None else importance.permuted(rows)
        sampled = {p: self._sampled(matrix) for p, matrix in residual.items()}
        self._sampled_residual = sampled
        # from the energy of the rows measured to that of all
        self._scale = {
            p: 1.0
            if self._all
            else _energy(residual[p], p, importance) / max(_energy(sampled[p], p, self._sampled_importance), 1e-300)
            for p in residual
        }

    def of(self, coder: Coder) -> list[float]:
        """Squared error for each projection."""
        projections = tuple(self._residual)
        if coder.config.method == "quantize" and self._importance is None:
            return self._of_quantised(coder, projections)
        if coder.config.method == "trellis":
            return [self._of_trellis(coder, p) * self._scale[p] for p in projections]
        groups = [projections] if coder.joint else [(p,) for p in projections]
        errors: dict[Projection, float] = {}
        for group in groups:
            errors |= self._of_group(coder, group)
        return [errors[p] for p in projections]

    def _of_quantised(self, coder: Coder, projections: tuple[Projection, ...]) -> list[float]:
        """Rows are coded one by one: all projections in one call, nothing packed."""
        rows = torch.cat([self._sampled_residual[p] for p in projections])
        bits, group_size = coder.config.bits, coder.config.group_size or None
        codes, scales = quantize_rows(rows, bits, group_size)
        restored = (codes - half_range(bits)) * expand_scales(scales, rows.shape[1], group_size)
        left = dict(zip(projections, (rows - restored).chunk(len(projections)), strict=True))
        return [squared_norm(left[p]) * self._scale[p] for p in projections]

    def _of_trellis(self, coder: Coder, projection: Projection) -> float:
        """Of the rows measured; a search of all would take as long as compressing."""
        rows, importance = self._sampled_residual[projection], self._sampled_importance
        bits, group_size = coder.config.bits, coder.config.group_size or None
        columns = None if importance is None else importance.columns.get(projection)
        whole = _searched_whole(rows.numel())
        picked = _some(len(rows), len(rows) if whole else TRELLIS_SEARCHED)
        some, counted = (rows if whole else rows[picked]), None if importance is None else importance.permuted(picked)
        symbols, scales = trellis_rows(some, bits, group_size, columns)
        restored = restored_rows(symbols, scales, bits, rows.shape[1], group_size)
        found = _energy(some - restored, projection, counted)
        if whole:
            return found

        def predicted(of: Tensor, counted: Importance | None) -> float:
            lost = predicted_errors(of, bits, group_size, columns)
            return float((lost if counted is None else lost * counted.rows[projection].to(lost.device)).sum())

        on_searched = predicted(some, counted)
        picked = _some(len(rows), TRELLIS_PREDICTED)
        more, counted = rows[picked], None if importance is None else importance.permuted(picked)
        energy = max(_energy(more, projection, counted), 1e-300)
        every = predicted(more, counted) * _energy(rows, projection, importance) / energy
        return every * (found / on_searched if on_searched else 1.0)

    def _of_group(self, coder: Coder, group: tuple[Projection, ...]) -> dict[Projection, float]:
        num_rows, hidden_size = next(iter(self._residual.values())).shape
        if not coder.factorises:
            left = {p: self._sampled_residual[p] for p in group}
            return self._coded(left, coder.parts(group, len(self._rows), hidden_size), hidden_size)
        # The factors are those of all rows; what follows them is coded row by row.
        factors, *others = coder.parts(group, num_rows, hidden_size)
        kept = self._after_low_rank.get(group)
        if kept is None or kept[0] != factors:
            kept = factors, self._left({p: self._residual[p] for p in group}, factors, hidden_size, self._importance)
            self._after_low_rank[group] = kept
        left = kept[1]
        if not others:
            return {p: _energy(matrix, p, self._importance) for p, matrix in left.items()}
        return self._coded({p: self._sampled(matrix) for p, matrix in left.items()}, tuple(others), hidden_size)

    def _coded(self, left: Rows, parts: tuple[ResidualPart, ...], hidden_size: int) -> dict[Projection, float]:
        for part in parts:
            own = {p: left[p] for p in part.projections}
            left = left | self._left(own, part, hidden_size, self._sampled_importance)
        return {p: _energy(matrix, p, self._sampled_importance) * self._scale[p] for p, matrix in left.items()}

    def _left(self, rows: Rows, part: ResidualPart, hidden_size: int, importance: Importance | None) -> Rows:
        """What a part, as stored, leaves."""
        columns = torch.cat([rows[p] for p in part.projections], 1)
        made = encode_part(columns, part, self._dtype, self._seed, importance)
        return {p: rows[p] - decoded.to(rows[p].device) for p, decoded in part.decode(made, hidden_size).items()}

    def _sampled(self, matrix: Tensor) -> Tensor:
        return matrix if self._all else matrix[self._rows.to(matrix.device)]
