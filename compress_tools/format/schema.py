"""The ``quantization_config`` block of a ResMoE checkpoint: frozen, versioned, unknown keys refused (SPEC.md, 2)."""

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from compress_tools.errors import FormatError
from compress_tools.format.dtypes import WeightDtype
from compress_tools.format.parts.base import PROJECTIONS, Bits, Frozen, GroupSize, Part, PartSizes, Projection
from compress_tools.format.parts.bitmap import BitmapResidual, RowBitmapResidual, ValueBits
from compress_tools.format.parts.dense import DenseCenter
from compress_tools.format.parts.low_rank import LowRankResidual
from compress_tools.format.parts.quantized import QuantizedCenter, QuantizedResidual
from compress_tools.format.parts.trellis import TrellisBits, TrellisCenter, TrellisResidual
from compress_tools.format.rest import WEIGHT

# The block and everything that it is made of.
__all__ = [
    "DRAFTS_VERSION",
    "FORMAT_VERSION",
    "PROJECTIONS",
    "QUANT_METHOD",
    "READABLE_VERSIONS",
    "REST_VERSION",
    "BitmapResidual",
    "Bits",
    "CenterPart",
    "CodedRest",
    "DenseCenter",
    "ExpertGroup",
    "ExpertNames",
    "GroupSize",
    "LayerSpec",
    "LowRankResidual",
    "Part",
    "PartSizes",
    "Projection",
    "QuantizedCenter",
    "QuantizedResidual",
    "ResMoEFormat",
    "ResidualPart",
    "RowBitmapResidual",
    "TrellisBits",
    "TrellisCenter",
    "TrellisResidual",
    "ValueBits",
    "WeightDtype",
    "parse_format",
    "part_classes",
    "version_for",
]

FormatVersion = Literal[1, 2, 3]
READABLE_VERSIONS: tuple[FormatVersion, ...] = get_args(FormatVersion)
# The least that is written: a later one where a layer needs it, so that what could be written before stays as it was.
FORMAT_VERSION: Final = 2
DRAFTS_VERSION: Final = 3
REST_VERSION: Final = 3
QUANT_METHOD: Final = "resmoe"

# Every way of storing rows: a new one is a class in parts/ and a row here.
CenterPart = Annotated[DenseCenter | QuantizedCenter | TrellisCenter, Field(discriminator="method")]
ResidualPart = Annotated[
    BitmapResidual | RowBitmapResidual | LowRankResidual | QuantizedResidual | TrellisResidual,
    Field(discriminator="method"),
]


def part_classes() -> tuple[type[Part], ...]:
    """The classes of all parts, centers' first."""
    return tuple(cls for union in (CenterPart, ResidualPart) for cls in get_args(get_args(union)[0]))


def _check_once(parts: Iterable[Part]) -> None:
    """Parts that store tensors of the same name can't share a projection."""
    seen: dict[tuple[Projection, str], str] = {}
    for part in parts:
        for key in ((projection, suffix) for projection in part.projections for suffix in part.roles):
            if key in seen:
                raise ValueError(
                    f"a projection is covered twice by the same method: {key[0]} by {seen[key]} and {part.method}"
                )
            seen[key] = part.method


class ExpertGroup(Frozen):
    """Experts of a layer that are coded alike."""

    experts: tuple[NonNegativeInt, ...] = Field(min_length=1)
    residual: tuple[ResidualPart, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _each_method_once_per_projection(self) -> Self:
        _check_once(self.residual)
        return self


class LayerSpec(Frozen):
    """How one MoE layer is stored: restored expert = sum of center parts + sum of residual parts.

    An empty ``center`` means no center (the residual is the weight itself). ``groups`` codes groups of experts
    differently, each by a residual of its own; ``residual`` is then empty.
    """

    center: tuple[CenterPart, ...]
    residual: tuple[ResidualPart, ...] = ()
    groups: tuple[ExpertGroup, ...] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _covered_once(self) -> Self:
        if bool(self.residual) == bool(self.groups):
            raise ValueError("expected either a residual or groups of experts with a residual each")
        _check_once(self.residual)
        covered = [projection for part in self.center for projection in part.projections]
        if len(covered) != len(set(covered)):
            raise ValueError(f"a projection is covered twice by the center: {covered}")
        listed = [expert for group in self.groups or () for expert in group.experts]
        if len(listed) != len(set(listed)):
            raise ValueError(f"an expert is in two groups: {sorted(listed)}")
        return self

    def expert_groups(self, num_experts: int) -> tuple[ExpertGroup, ...]:
        """The layer's groups; one of all experts where the spec has none."""
        return self.groups or (ExpertGroup(experts=tuple(range(num_experts)), residual=self.residual),)

    def of_group(self, group: ExpertGroup) -> "LayerSpec":
        """This layer as one group of experts is stored: without groups."""
        return LayerSpec(center=self.center, residual=group.residual)

    def newer_than(self, version: int) -> tuple[str, int] | None:
        """The first key or method that a ``format_version`` doesn't have, and the first that does."""
        if version < 2 and "groups" in self.model_fields_set:
            return "groups", 2
        residuals = (self.residual, *(group.residual for group in self.groups or ()))
        parts: list[Part] = [*self.center, *(part for residual in residuals for part in residual)]
        return next((newer for part in parts if (newer := part.newer_than(version))), None)

    def describe(self) -> str:
        """For people: ``dense center + bitmap (1234 values, joint)``."""
        center = " + ".join(part.describe() for part in self.center) or "no center"
        if self.groups is None:
            return " + ".join([center, *(part.describe() for part in self.residual)])
        groups = [
            f"{len(group.experts)} experts {' + '.join(part.describe() for part in group.residual)}"
            for group in self.groups
        ]
        return f"{center} + [{'; '.join(groups)}]"

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The layer's projections, those that its residuals cover, in the design matrix's order."""
        parts = self.residual or (self.groups or ())[0].residual
        covered = {projection for part in parts for projection in part.projections}
        return tuple(projection for projection in PROJECTIONS if projection in covered)

    def of_expert(self, expert: int) -> "LayerSpec":
        """This layer as one expert is stored: without groups; itself where it has none.

        Raises:
            FormatError: no group has the expert.
        """
        if self.groups is None:
            return self
        for group in self.groups:
            if expert in group.experts:
                return self.of_group(group)
        raise FormatError(f"expert {expert} is in no group")


class ExpertNames(Frozen):
    """Where the experts' tensors are: ``<expert>.<projection>.<suffix>``.

    ``expert`` holds ``{layer}`` and ``{expert}``; ``projections`` maps each projection to its on-disk name;
    ``layers`` gives the text that stands for ``{layer}`` where it is not the layer's index. ``drafts`` names experts of
    multi-token-prediction layers, which stand beside the decoder: by layer index, with ``{expert}``.
    """

    expert: str
    projections: dict[Projection, str] = Field(min_length=1)
    layers: dict[int, str] = Field(default_factory=dict)
    drafts: dict[int, str] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _placeholders(self) -> "ExpertNames":
        for placeholder in ("{layer}", "{expert}"):
            if self.expert.count(placeholder) != 1:
                raise ValueError(f"names.expert must hold {placeholder} once, found {self.expert!r:.100}")
        for layer, name in (self.drafts or {}).items():
            if name.count("{expert}") != 1 or re.search(r"\.\d+\.", name.partition("{expert}")[0]) is None:
                raise ValueError(
                    f"names.drafts: {layer}: expected a name with the layer's number and once {{expert}}, "
                    f"found {name!r:.100}"
                )
        return self

    def expert_stem(self, layer: int, expert: int) -> str:
        """Name of one expert."""
        if self.drafts and layer in self.drafts:
            return self.drafts[layer].replace("{expert}", str(expert))
        text = self.layers.get(layer, str(layer))
        return self.expert.replace("{layer}", text).replace("{expert}", str(expert))


class CodedRest(Frozen):
    """Matrices beside the routed experts that are stored in codes by row (``format/rest.py``).

    ``tensors`` names each, as it is called where it is not coded: ``<module>.weight``.
    """

    bits: Literal[8]
    tensors: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _weights_once(self) -> Self:
        if odd := next((name for name in self.tensors if not name.endswith(WEIGHT)), None):
            raise ValueError(f"rest.tensors: expected names that end in {WEIGHT}, found {odd!r:.100}")
        if len(set(self.tensors)) != len(self.tensors):
            raise ValueError("rest.tensors names a tensor twice")
        return self


class ResMoEFormat(Frozen):
    """The whole block. ``layers`` is keyed by layer index; absent layers are not compressed.

    ``biases``: every expert of every compressed layer has a bias for each projection, stored as it is.
    """

    quant_method: Literal["resmoe"] = QUANT_METHOD
    format_version: FormatVersion = FORMAT_VERSION
    written_by: str
    dtype: WeightDtype
    num_experts: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    biases: bool = False
    names: ExpertNames
    layers: dict[int, LayerSpec]
    rest: CodedRest | None = None

    @cached_property
    def rest_tensors(self) -> frozenset[str]:
        """Names of the matrices beside the routed experts that are stored in codes."""
        return frozenset() if self.rest is None else frozenset(self.rest.tensors)

    @property
    def decoder_layers(self) -> tuple[int, ...]:
        """Compressed layers of the decoder: all but those that ``names.drafts`` names."""
        return tuple(layer for layer in self.layers if layer not in (self.names.drafts or {}))

    @property
    def gated(self) -> bool:
        """Experts have a gate."""
        return "gate_proj" in self.names.projections

    @property
    def sizes(self) -> PartSizes:
        """What the tensors of a part depend on."""
        return PartSizes(self.intermediate_size, self.hidden_size, self.dtype)

    @model_validator(mode="after")
    def _drafts_fit(self) -> Self:
        drafts = self.names.drafts or {}
        if drafts and self.format_version < DRAFTS_VERSION:
            raise ValueError(f"names.drafts needs format_version {DRAFTS_VERSION}, this is {self.format_version}")
        if unknown := sorted(set(drafts) - set(self.layers)):
            raise ValueError(f"names.drafts: {unknown} are not in layers")
        return self

    @model_validator(mode="after")
    def _rest_fits(self) -> Self:
        if self.rest is not None and self.format_version < REST_VERSION:
            raise ValueError(f"rest needs format_version {REST_VERSION}, this is {self.format_version}")
        return self

    @model_validator(mode="after")
    def _layers_fit(self) -> Self:
        for index, layer in self.layers.items():
            if index < 0:
                raise ValueError(f"layer index {index} is negative")
            if newer := layer.newer_than(self.format_version):
                key, since = newer
                raise ValueError(f"layer {index}: {key} needs format_version {since}, this is {self.format_version}")
            # A damaged count must not be counted up to: where there are no groups, there is nothing to compare.
            listed = sorted(expert for group in layer.groups or () for expert in group.experts)
            if layer.groups and (len(listed) != self.num_experts or listed != list(range(len(listed)))):
                raise ValueError(
                    f"layer {index}: groups list experts {listed!s:.200}, expected 0..{self.num_experts - 1}"
                )
            for residual in [group.residual for group in layer.groups or ()] or [layer.residual]:
                self._check_parts(index, layer.center, residual)
        return self

    def _check_parts(self, index: int, center: tuple[CenterPart, ...], residual: tuple[ResidualPart, ...]) -> None:
        known = set(self.names.projections)
        for part in (*center, *residual):
            if unknown := set(part.projections) - known:
                raise ValueError(f"layer {index}: projections {sorted(unknown)} are not in names.projections")
        covered = {projection for part in residual for projection in part.projections}
        if covered != known:
            raise ValueError(f"layer {index}: residual covers {sorted(covered)}, expected {sorted(known)}")
        for part in (*center, *residual):
            if fault := part.size_fault(self.sizes):
                raise ValueError(f"layer {index}: {fault}")


def version_for(layers: Iterable[LayerSpec], drafts: Mapping[int, str], rest: CodedRest | None = None) -> FormatVersion:
    """The ``format_version`` to write: the first, from ``FORMAT_VERSION`` on, that has all of a checkpoint."""
    specs = list(layers)
    least = max(FORMAT_VERSION, DRAFTS_VERSION if drafts else 0, 0 if rest is None else REST_VERSION)
    versions = [version for version in READABLE_VERSIONS if version >= least]
    return next(version for version in versions if not any(spec.newer_than(version) for spec in specs))


def parse_format(block: Mapping[str, Any], where: str = "config.json") -> ResMoEFormat:
    """Validate a ``quantization_config`` block.

    Args:
        block: the block as read from JSON.
        where: named in the error.
    Returns:
        the validated block.
    Raises:
        FormatError: not ResMoE, another format_version, unknown or missing keys, sizes that can't be.
    """
    if block.get("quant_method") != QUANT_METHOD:
        raise FormatError(f"{where}: quant_method is {block.get('quant_method')!r}, expected {QUANT_METHOD!r}")
    if block.get("format_version") not in READABLE_VERSIONS:
        raise FormatError(
            f"{where}: ResMoE format_version {block.get('format_version')!r} is not readable by this version, "
            f"which reads {', '.join(map(str, READABLE_VERSIONS[:-1]))} and {READABLE_VERSIONS[-1]}; "
            "install the version that wrote it, "
            f"or compress again"
        )
    try:
        return ResMoEFormat.model_validate(dict(block))
    except ValidationError as err:
        first = err.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "quantization_config"
        raise FormatError(f"{where}: quantization_config: {key}: {first['msg']}") from err
