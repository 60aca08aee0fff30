"""One layer's choices as a frontier, and a choice as the spec that a checkpoint holds."""

from dataclasses import dataclass
from math import log

from torch import Tensor

from compress_tools.format.schema import ExpertGroup, LayerSpec, Projection, QuantizedResidual, ResidualPart
from compress_tools.planner.candidates import CenterBits, Coder, Sizes, center_parts
from compress_tools.planner.frontier import Frontier, combined, frontier, union
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
        center = []
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

    They come last: what is quantised beside low rank is what low rank left.
    """
    quantised: dict[tuple[int, int | None], list[Projection]] = {}
    others: list[ResidualPart] = []
    for part in parts:
        if part.method == "quantized":
            quantised.setdefault((part.bits, part.group_size), []).extend(part.projections)
        else:
            others.append(part)
    merged = (
        QuantizedResidual(projections=tuple(projections), bits=bits, group_size=group_size)
        for (bits, group_size), projections in quantised.items()
    )
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


def layer_choices(
    measured: LayerMeasurement, weights: Tensor, groups: Groups, sizes: Sizes, dense_bytes: int
) -> Frontier:
    """The frontier of everything that can be done to a layer; its picks are ``(Choice,)``, or ``(None,)`` for dense.

    Args:
        measured: the candidates.
        weights: what a unit of squared error counts, float64 ``[E, P]``.
        groups: of experts.
        sizes: of the model.
        dense_bytes: of the layer as it is.
    """
    apart: Frontier | None = None
    for number in range(len(sizes.projections)):
        own = _projection_choices(measured, weights, groups, sizes, number)
        apart = own if apart is None else combined(apart, own)
    everything = [frontier([(dense_bytes, 0.0, (None,))])]
    if apart is not None and len(apart.picks):
        picks = [
            (Choice(groups, tuple(bits for bits, _ in pick), tuple(coders for _, coders in pick)),)
            for pick in apart.picks
        ]
        everything.append(Frontier(apart.nbytes, apart.errors, picks).shifted(sizes.layer_biases))
    joint = [(bits, coder) for bits, coder in measured.errors if coder.joint]
    everything.append(frontier(uniform_choice(measured, weights, sizes, bits, coder) for bits, coder in joint))
    return union(everything)


def uniform_choice(
    measured: LayerMeasurement, weights: Tensor, sizes: Sizes, bits: CenterBits, coder: Coder
) -> tuple[int, float, tuple[Choice]]:
    """Bytes, error and pick of a layer that one coder stores throughout."""
    error = float((measured.errors[bits, coder] * weights).sum())
    everyone = (tuple(range(sizes.num_experts)),)
    width = len(sizes.projections)
    return sizes.uniform(coder, bits), error, (Choice(everyone, (bits,) * width, ((coder,),) * width),)


def _projection_choices(
    measured: LayerMeasurement, weights: Tensor, groups: Groups, sizes: Sizes, number: int
) -> Frontier:
    projection = (sizes.projections[number],)
    by_center = []
    for bits in measured.residuals:
        coders = [coder for center, coder in measured.errors if center == bits and not coder.joint]
        each = {coder: sizes.expert(coder.parts(projection, sizes.rows, sizes.hidden_size)) for coder in coders}
        total: Frontier | None = None
        for experts in groups:
            picked = list(experts)
            own = frontier(
                (
                    len(picked) * each[coder],
                    float((measured.errors[bits, coder][picked, number] * weights[picked, number]).sum()),
                    (coder,),
                )
                for coder in coders
            )
            total = own if total is None else combined(total, own)
        if total is not None and total.picks:
            picks = [((bits, pick),) for pick in total.picks]
            by_center.append(Frontier(total.nbytes, total.errors, picks).shifted(sizes.center(bits, projection)))
    return union(by_center)
