"""The menu: every way to store a projection, or a layer as a whole, that is measured and may be chosen."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Final, Literal

from compress_tools.config import CompressionConfig, make_config
from compress_tools.errors import ConfigError
from compress_tools.format.schema import (
    CenterPart,
    LayerSpec,
    Projection,
    ResidualPart,
    ResMoEFormat,
)
from compress_tools.format.tensors import expert_tensors, shared_tensors
from compress_tools.residuals.recipes import RECIPES, center_part

# Bits of the center; 0: none, 16: the model's dtype.
CenterBits = Literal[0, 4, 8, 16]
CENTER_GROUP: Final = 128
GROUP_SIZES = (0, 128, 64, 32)
TRELLIS_GROUP_SIZES = (0, 128)
DENSITIES = (0.05, 0.1, 0.2, 0.35, 0.5)
DENSITIES_8 = (0.1, 0.25)
_BISECTIONS = 40
# GPU kernels read U's columns in steps of 64, and pad others in memory; the matrix units take 16.
RANK_STEPS = (64, 16)


@dataclass(frozen=True)
class Coder:
    """A residual coder and its settings.

    Attributes:
        config: ``method`` and its settings; everything else is default.
        joint: covers all projections of a layer together (one threshold, or U shared); else each by itself.
        centers: bits of the centers it is offered with.
    """

    config: CompressionConfig
    joint: bool
    centers: tuple[CenterBits, ...]

    @property
    def factorises(self) -> bool:
        """Whether low rank is part of it."""
        return "low-rank" in self.config.method

    @cached_property
    def label(self) -> str:
        """For people: the command line's words."""
        codes, low_rank = ("bits", "group_size"), ("retain_ratio", "factor_bits")
        fields = {"quantize": codes, "trellis": codes, "prune": ("retain_ratio", "value_bits", "group_size")}
        fields |= {"low-rank": low_rank}
        fields |= {f"low-rank+{coder}": (*low_rank, *codes) for coder in ("quantize", "trellis")}
        settings = self.config.model_dump()
        words = [f"{name.replace('_', '-')} {_short(settings[name])}" for name in fields[self.config.method]]
        return ", ".join([self.config.method + (" (joint)" if self.joint else ""), *words])

    def parts(self, projections: tuple[Projection, ...], rows: int, hidden_size: int) -> tuple[ResidualPart, ...]:
        """How these projections of ``rows`` rows are stored."""
        return RECIPES[self.config.method](self.config, projections, rows, hidden_size)

    def keeps_any(self, projections: tuple[Projection, ...], rows: int, hidden_size: int) -> bool:
        """Whether it keeps anything at all of matrices this small."""
        try:
            self.parts(projections if self.joint else projections[:1], rows, hidden_size)
        except ConfigError:
            return False
        return True


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def center_parts(bits: CenterBits, projections: tuple[Projection, ...]) -> tuple[CenterPart, ...]:
    """How a center of these projections is stored: in 4 bits as trellis codes, at less bytes and less error."""
    if not bits or not projections:
        return ()
    return (
        center_part(bits, projections, None, "trellis") if bits == 4 else center_part(bits, projections, CENTER_GROUP),
    )


class Sizes:
    """Stored bytes of candidates, by the format's own count.

    Args:
        fmt: any format block of the model; its layers don't matter.
    """

    def __init__(self, fmt: ResMoEFormat) -> None:
        self.rows, self.hidden_size = fmt.intermediate_size, fmt.hidden_size
        self.num_experts = fmt.num_experts
        self.projections: tuple[Projection, ...] = tuple(fmt.names.projections)
        self._fmt = fmt.model_copy(update={"biases": False})
        self._biased = fmt

    def center(self, bits: CenterBits, projections: tuple[Projection, ...]) -> int:
        """Bytes of a layer's center."""
        spec = LayerSpec.model_construct(center=center_parts(bits, projections))
        return sum(tensor.nbytes for tensor in shared_tensors(self._fmt, spec))

    def expert(self, parts: tuple[ResidualPart, ...]) -> int:
        """Bytes of one expert's parts."""
        return sum(tensor.nbytes for tensor in expert_tensors(self._fmt, LayerSpec(center=(), residual=parts), 0))

    @property
    def layer_biases(self) -> int:
        """Bytes of the biases of a layer's experts, which are stored as they are."""
        some = LayerSpec.model_construct(center=(), residual=(), groups=None)
        return self.num_experts * sum(tensor.nbytes for tensor in expert_tensors(self._biased, some, 0))

    def uniform(self, coder: Coder, bits: CenterBits) -> int:
        """Bytes of a layer stored by one coder throughout."""
        groups = [self.projections] if coder.joint else [(projection,) for projection in self.projections]
        each = sum(self.expert(coder.parts(group, self.rows, self.hidden_size)) for group in groups)
        return self.center(bits, self.projections) + self.num_experts * each + self.layer_biases


def menu(
    sizes: Sizes, methods: tuple[str, ...], centers: tuple[CenterBits, ...], layer_budget: float
) -> tuple[Coder, ...]:
    """Every coder to be measured, in a fixed order.

    Args:
        sizes: of the model.
        methods: which of the command line's methods.
        centers: bits of the centers that may be made.
        layer_budget: bytes of a layer if all had the same: pruning and low rank of whole layers are offered at
            the size that just fills it, so that one coder for all layers can use the budget up.
    """
    coders: list[Coder] = []
    for method in methods:
        coders += _MENUS[method](sizes, centers, layer_budget)
    return tuple(coder for coder in coders if _fits(coder, sizes))


def _fits(coder: Coder, sizes: Sizes) -> bool:
    return bool(coder.centers) and coder.keeps_any(sizes.projections, sizes.rows, sizes.hidden_size)


def _quantize(sizes: Sizes, centers: tuple[CenterBits, ...], layer_budget: float) -> list[Coder]:
    del layer_budget
    # A group as wide as the row is the row.
    groups = [size for size in GROUP_SIZES if size < sizes.hidden_size]
    return [
        Coder(make_config(method="quantize", bits=bits, group_size=size), joint=False, centers=centers)
        for bits in (2, 3, 4, 8)
        for size in groups
    ]


def _trellis(sizes: Sizes, centers: tuple[CenterBits, ...], layer_budget: float) -> list[Coder]:
    del layer_budget
    return [
        Coder(
            make_config(method="trellis", bits=bits, group_size=size),
            joint=False,
            centers=centers,
        )
        for bits in (1, 2, 3, 4)
        for size in TRELLIS_GROUP_SIZES
        if size < sizes.hidden_size
    ]


def _prune(sizes: Sizes, centers: tuple[CenterBits, ...], layer_budget: float) -> list[Coder]:
    # Values of 16 bits are worth their bytes only where few are kept: offered for whole layers, at the size that fits.
    ladder = [(4, density) for density in DENSITIES] + [(8, density) for density in DENSITIES_8]
    coders = [
        Coder(
            make_config(method="prune", value_bits=bits, retain_ratio=density),
            joint=False,
            centers=_without(centers, 16),
        )
        for bits, density in ladder
    ]
    options: list[dict[str, object]] = [{"method": "prune", "value_bits": bits} for bits in (4, 8, 16)]
    return coders + _filling(sizes, centers, layer_budget, options)


def whole_ranks(sizes: Sizes, retain_ratios: tuple[float, ...]) -> tuple[float, ...]:
    """Ratios near these, without repeats, whose ranks for one projection are multiples of ``RANK_STEPS``.

    The larger step where the rank changes by a quarter at most, else the smaller; smaller ranks stay as they are.
    """
    rows, columns = sizes.rows, sizes.hidden_size
    each = rows * columns / (rows + columns)
    found = []
    for ratio in retain_ratios:
        rank = ratio * each
        near = [own for step in RANK_STEPS if abs((own := round(rank / step) * step) - rank) <= rank / 4]
        # Half a rank more, so that rounding does not make it one less.
        found.append((near[0] + 0.5) / each if near else ratio)
    return tuple(dict.fromkeys(found))


def _low_rank(sizes: Sizes, centers: tuple[CenterBits, ...], layer_budget: float) -> list[Coder]:
    few = _without(centers, 16, 4)
    coders = [
        Coder(make_config(method="low-rank", factor_bits=8, retain_ratio=ratio), joint=False, centers=few)
        for ratio in whole_ranks(sizes, (0.05, 0.125, 0.25))
    ]
    options: list[dict[str, object]] = [
        {"method": "low-rank", "factor_bits": 8},
        {"method": "low-rank", "factor_bits": 16},
    ]
    return coders + _filling(sizes, _without(centers, 4), layer_budget, options)


def _low_rank_and(coder: str, sizes: Sizes, centers: tuple[CenterBits, ...], layer_budget: float) -> list[Coder]:
    del layer_budget
    few = _without(centers, 16, 4)
    return [
        Coder(
            make_config(method=f"low-rank+{coder}", factor_bits=8, retain_ratio=ratio, bits=bits),
            joint=False,
            centers=few,
        )
        for ratio in whole_ranks(sizes, (0.02, 0.06))
        for bits in (2, 3)
    ]


_MENUS: dict[str, Callable[[Sizes, tuple[CenterBits, ...], float], list[Coder]]] = {
    "trellis": _trellis,
    "quantize": _quantize,
    "prune": _prune,
    "low-rank": _low_rank,
    "low-rank+quantize": partial(_low_rank_and, "quantize"),
    "low-rank+trellis": partial(_low_rank_and, "trellis"),
}


def _without(centers: tuple[CenterBits, ...], *left_out: CenterBits) -> tuple[CenterBits, ...]:
    return tuple(bits for bits in centers if bits not in left_out)


def _filling(
    sizes: Sizes, centers: tuple[CenterBits, ...], layer_budget: float, options: list[dict[str, object]]
) -> list[Coder]:
    """Joint coders at the retain ratio that fills ``layer_budget``, one for each center."""
    coders = []
    for settings in options:
        for bits in centers:
            low, high = 0.0, 1.0
            for _ in range(_BISECTIONS):
                middle = (low + high) / 2
                coder = Coder(make_config(**settings, retain_ratio=middle), joint=True, centers=(bits,))
                fits = not _fits(coder, sizes) or sizes.uniform(coder, bits) <= layer_budget
                low, high = (middle, high) if fits else (low, middle)
            if low > 0:
                coders.append(Coder(make_config(**settings, retain_ratio=low), joint=True, centers=(bits,)))
    return [coder for coder in coders if _fits(coder, sizes) and sizes.uniform(coder, *coder.centers) <= layer_budget]
