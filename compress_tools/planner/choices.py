"""One layer's choices as a frontier, and a choice as the spec that a checkpoint holds."""

from dataclasses import dataclass
from functools import partial
from math import log

from torch import Tensor

from compress_tools.format.schema import (
    CenterPart,
    ExpertGroup,
    LayerSpec,
    Projection,
    QuantizedResidual,
    ResidualPart,
    TrellisResidual,
)
from compress_tools.planner.candidates import CenterBits, Coder, Sizes, center_parts
from compress_tools.planner.frontier import Frontier, Point, combined, frontier, union
from compress_tools.planner.measure import LayerMeasurement

# Two groups of experts are offered where, at equal bytes, the error would fall by at least this share.
GROUP_GAIN = 0.02

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Choice:
    """How a layer is stored.

    Attributes:
        groups: experts of each group; one group of all where they are stored alike.
        centers: bits of the center, for each projection.
        coders: for each projection, the coder of each group; one joint coder stands for all projections.
    """

    groups: Groups
    centers: tuple[CenterBits, ...]
    coders: tuple[tuple[Coder, ...], ...]

    def spec(self, sizes: Sizes) -> LayerSpec:
        """As the format says it."""
        center: list[CenterPart] = []
        for bits in dict.fromkeys(self.centers):
            covered = tuple(p for p, own in zip(sizes.projections, self.centers, strict=True) if own == bits)
            center += center_parts(bits, covered)
        residuals = [self._residual(sizes, number) for number in range(len(self.groups))]
        if all(residual == residuals[0] for residual in residuals):
            return LayerSpec(center=tuple(center), residual=residuals[0])
        groups = zip(self.groups, residuals, strict=True)
        return LayerSpec(
            center=tuple(center),
            groups=tuple(ExpertGroup(experts=experts, residual=residual) for experts, residual in groups),
        )

    def _residual(self, sizes: Sizes, group: int) -> tuple[ResidualPart, ...]:
        if self.coders[0][group].joint:
            return self.coders[0][group].parts(sizes.projections, sizes.rows, sizes.hidden_size)
        parts: list[ResidualPart] = []
        for projection, coders in zip(sizes.projections, self.coders, strict=True):
            parts += coders[group].parts((projection,), sizes.rows, sizes.hidden_size)
        return _merged(parts)


def _merged(parts: list[ResidualPart]) -> tuple[ResidualPart, ...]:
    """Codes of the same bits as one part of several projections: the same tensors, said shorter.

    They come last: what is coded beside low rank is what low rank left.
    """
    alike: dict[ResidualPart, list[Projection]] = {}
    others: list[ResidualPart] = []
    for part in parts:
        if isinstance(part, QuantizedResidual | TrellisResidual):
            alike.setdefault(part.model_copy(update={"projections": ()}), []).extend(part.projections)
        else:
            others.append(part)
    merged = (part.model_copy(update={"projections": tuple(covered)}) for part, covered in alike.items())
    return (*others, *merged)


def expert_groups(energies: Tensor, most: int) -> Groups:
    """Split experts by energy where it pays most, if it pays.

    By reverse water-filling, groups that each have a rate of their own end at ``prod_g mean_g^(n_g/E)`` in place of
    ``mean`` for each of the experts, everything else equal.

    Args:
        energies: weighted residual energy of each expert, ``[E]``.
        most: groups at most, 1 or 2.
    """
    order = sorted(range(len(energies)), key=lambda expert: (float(energies[expert]), expert))
    values = [float(energies[expert]) for expert in order]
    count, everything = len(order), (tuple(range(len(order))),)
    if most == 1 or values[0] <= 0:
        return everything

    def loss(split: int) -> float:
        low, high = values[:split], values[split:]
        return sum(len(part) / count * log(sum(part) / len(part)) for part in (low, high))

    split = min(range(1, count), key=loss, default=0)
    if not split or log(sum(values) / count) - loss(split) < GROUP_GAIN:
        return everything
    return tuple(sorted(order[:split])), tuple(sorted(order[split:]))


@dataclass(frozen=True)
class Rated:
    """What a layer's choices are rated by.

    Attributes:
        measured: the candidates.
        weights: what a unit of squared error counts, float64 ``[E, P]``.
        sizes: of the model.
    """

    measured: LayerMeasurement
    weights: Tensor
    sizes: Sizes

    def uniform(self, bits: CenterBits, coder: Coder) -> Point[Choice]:
        """A layer that one coder stores throughout."""
        error = float((self.measured.errors[bits, coder] * self.weights).sum())
        everyone = (tuple(range(self.sizes.num_experts)),)
        width = len(self.sizes.projections)
        return Point(self.sizes.uniform(coder, bits), error, Choice(everyone, (bits,) * width, ((coder,),) * width))

    def choices(self, groups: Groups, dense_bytes: int) -> Frontier[Choice | None]:
        """The frontier of everything that can be done to a layer; None leaves it as it is, at ``dense_bytes``."""
        joint = (self.uniform(bits, coder) for bits, coder in self.measured.errors if coder.joint)
        everything: list[Point[Choice | None]] = [Point(dense_bytes, 0.0, None)]
        everything += self._apart(groups).shifted(self.sizes.layer_biases).points()
        return frontier([*everything, *joint])

    def _apart(self, groups: Groups) -> Frontier[Choice]:
        """Every projection and every group of experts by itself."""
        apart = frontier([Point[tuple[_OfProjection, ...]](0, 0.0, ())])
        for number in range(len(self.sizes.projections)):
            apart = combined(apart, self._of_projection(groups, number), lambda before, own: (*before, own))
        return apart.map(
            lambda picks: Choice(groups, tuple(own.center for own in picks), tuple(own.coders for own in picks))
        )

    def _of_projection(self, groups: Groups, number: int) -> "Frontier[_OfProjection]":
        projection = (self.sizes.projections[number],)
        by_center = []
        for bits, errors in self._by_center(number).items():
            each = {
                coder: self.sizes.expert(coder.parts(projection, self.sizes.rows, self.sizes.hidden_size))
                for coder in errors
            }
            total = frontier([Point[tuple[Coder, ...]](self.sizes.center(bits, projection), 0.0, ())])
            for experts in groups:
                picked = list(experts)
                own = frontier(
                    Point(len(picked) * each[coder], float(error[picked].sum()), coder)
                    for coder, error in errors.items()
                )
                total = combined(total, own, lambda before, coder: (*before, coder))
            by_center.append(total.map(partial(_OfProjection, bits)))
        return union(by_center)

    def _by_center(self, number: int) -> dict[CenterBits, dict[Coder, Tensor]]:
        """Weighed errors ``[E]`` of one projection, by center and by coder."""
        found: dict[CenterBits, dict[Coder, Tensor]] = {bits: {} for bits in self.measured.residuals}
        for (bits, coder), errors in self.measured.errors.items():
            if not coder.joint:
                found[bits][coder] = errors[:, number] * self.weights[:, number]
        return found


@dataclass(frozen=True)
class _OfProjection:
    """How a projection is stored: bits of its center, and the coder of each group of experts."""

    center: CenterBits
    coders: tuple[Coder, ...]
