"""The ``quantization_config`` block of a ResMoE checkpoint: frozen, versioned, unknown keys refused (SPEC.md, 2)."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from compress_tools.errors import FormatError

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
QUANT_METHOD = "resmoe"

Projection = Literal["gate_proj", "up_proj", "down_proj"]
WeightDtype = Literal["float32", "float16", "bfloat16"]
Bits = Literal[2, 3, 4, 8]
ValueBits = Literal[4, 8]
# Columns that share a scale; a row's last group may be shorter. None: the whole row.
GroupSize = Literal[32, 64, 128]

# The design matrix's column order. Two-matrix experts have no gate_proj.
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_serializer(mode="wrap")
    def _without_absent_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


class DenseCenter(_Frozen):
    """Center rows stored as they are, one ``[I, H]`` tensor per projection."""

    method: Literal["dense"] = "dense"
    projections: tuple[Projection, ...] = Field(min_length=1)


class QuantizedCenter(_Frozen):
    """Center rows as codes and scales."""

    method: Literal["quantized"] = "quantized"
    projections: tuple[Projection, ...] = Field(min_length=1)
    bits: Bits
    group_size: GroupSize | None = None


class _Pruned(_Frozen):
    """``value_bits``: kept values as codes and scales instead of the checkpoint's dtype."""

    value_bits: ValueBits | None = None
    group_size: GroupSize | None = None

    @model_validator(mode="after")
    def _groups_need_codes(self) -> Self:
        if self.group_size is not None and self.value_bits is None:
            raise ValueError("group_size without value_bits")
        return self


class BitmapResidual(_Pruned):
    """Pruned residual: one bit per weight, then the kept values. The count is shared by the group."""

    method: Literal["bitmap"] = "bitmap"
    projections: tuple[Projection, ...] = Field(min_length=1)
    values_per_expert: PositiveInt


class RowBitmapResidual(_Pruned):
    """Pruned residual with equally many kept values in every row of every projection: fixed strides."""

    method: Literal["bitmap_rows"] = "bitmap_rows"
    projections: tuple[Projection, ...] = Field(min_length=1)
    values_per_row: PositiveInt


class LowRankResidual(_Frozen):
    """``U @ V``: U ``[I, R]`` shared by the group's projections, V ``[R, H]`` for each.

    ``factor_bits``: factors as codes with one scale for each row.
    """

    method: Literal["low_rank"] = "low_rank"
    projections: tuple[Projection, ...] = Field(min_length=1)
    rank: PositiveInt
    factor_bits: Literal[8] | None = None


class QuantizedResidual(_Frozen):
    """Every weight as a code of few bits, with a scale for each group of a row's columns."""

    method: Literal["quantized"] = "quantized"
    projections: tuple[Projection, ...] = Field(min_length=1)
    bits: Bits
    group_size: GroupSize | None = None


CenterPart = Annotated[DenseCenter | QuantizedCenter, Field(discriminator="method")]
ResidualPart = Annotated[
    BitmapResidual | RowBitmapResidual | LowRankResidual | QuantizedResidual, Field(discriminator="method")
]
# Methods that store tensors of the same name: a projection takes one of them.
_MASKED = {"bitmap": "bitmap", "bitmap_rows": "bitmap"}


def _check_once(parts: tuple[CenterPart | ResidualPart, ...]) -> None:
    seen = [(_MASKED.get(part.method, part.method), projection) for part in parts for projection in part.projections]
    if len(seen) != len(set(seen)):
        raise ValueError(f"a projection is covered twice by the same method: {seen}")


class ExpertGroup(_Frozen):
    """Experts of a layer that are coded alike."""

    experts: tuple[NonNegativeInt, ...] = Field(min_length=1)
    residual: tuple[ResidualPart, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _each_method_once_per_projection(self) -> Self:
        _check_once(self.residual)
        return self


class LayerSpec(_Frozen):
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


class ExpertNames(_Frozen):
    """Where the experts' tensors are: ``<expert>.<projection>.<suffix>``.

    ``expert`` holds ``{layer}`` and ``{expert}``; ``projections`` maps each projection to its on-disk name;
    ``layers`` gives the text that stands for ``{layer}`` where it is not the layer's index.
    """

    expert: str
    projections: dict[Projection, str] = Field(min_length=1)
    layers: dict[int, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _placeholders(self) -> "ExpertNames":
        for placeholder in ("{layer}", "{expert}"):
            if self.expert.count(placeholder) != 1:
                raise ValueError(f"names.expert must hold {placeholder} once, found {self.expert!r}")
        return self

    def expert_stem(self, layer: int, expert: int) -> str:
        """Name of one expert."""
        text = self.layers.get(layer, str(layer))
        return self.expert.replace("{layer}", text).replace("{expert}", str(expert))


class ResMoEFormat(_Frozen):
    """The whole block. ``layers`` is keyed by layer index; absent layers are not compressed.

    ``biases``: every expert of every compressed layer has a bias for each projection, stored as it is.
    """

    quant_method: Literal["resmoe"] = QUANT_METHOD
    format_version: Literal[1, 2] = FORMAT_VERSION
    written_by: str
    dtype: WeightDtype
    num_experts: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    biases: bool = False
    names: ExpertNames
    layers: dict[int, LayerSpec]

    @model_validator(mode="after")
    def _layers_fit(self) -> Self:
        known = set(self.names.projections)
        for index, layer in self.layers.items():
            if index < 0:
                raise ValueError(f"layer index {index} is negative")
            if self.format_version == 1 and (key := _newer_than_version_1(layer)):
                raise ValueError(f"layer {index}: {key} needs format_version 2, this is 1")
            groups = layer.expert_groups(self.num_experts)
            listed = sorted(expert for group in groups for expert in group.experts)
            if listed != list(range(self.num_experts)):
                raise ValueError(f"layer {index}: groups list experts {listed}, expected 0..{self.num_experts - 1}")
            for group in groups:
                for part in (*layer.center, *group.residual):
                    if unknown := set(part.projections) - known:
                        raise ValueError(f"layer {index}: projections {sorted(unknown)} are not in names.projections")
                covered = {projection for part in group.residual for projection in part.projections}
                if covered != known:
                    raise ValueError(f"layer {index}: residual covers {sorted(covered)}, expected {sorted(known)}")
                for part in group.residual:
                    self._check_size(index, part)
        return self

    def _check_size(self, index: int, part: ResidualPart) -> None:
        columns = len(part.projections) * self.hidden_size
        if part.method == "bitmap" and part.values_per_expert > self.intermediate_size * columns:
            raise ValueError(
                f"layer {index}: values_per_expert {part.values_per_expert} exceeds the "
                f"{self.intermediate_size * columns} weights it is drawn from"
            )
        if part.method == "bitmap_rows" and part.values_per_row > self.hidden_size:
            raise ValueError(f"layer {index}: values_per_row {part.values_per_row} exceeds H = {self.hidden_size}")
        if part.method == "low_rank" and part.rank > min(self.intermediate_size, columns):
            raise ValueError(
                f"layer {index}: rank {part.rank} exceeds min(I, columns) = {min(self.intermediate_size, columns)}"
            )


_VERSION_1_KEYS = {
    "dense": {"method", "projections"},
    "bitmap": {"method", "projections", "values_per_expert"},
    "low_rank": {"method", "projections", "rank"},
}


def _newer_than_version_1(layer: LayerSpec) -> str | None:
    """The first key or method of a layer that version 1 doesn't have."""
    if "groups" in layer.model_fields_set:
        return "groups"
    for part in (*layer.center, *layer.residual):
        if part.method not in _VERSION_1_KEYS:
            return part.method
        if newer := part.model_fields_set - _VERSION_1_KEYS[part.method]:
            return min(newer)
    return None


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
            f"which reads {' and '.join(map(str, READABLE_VERSIONS))}; install the version that wrote it, "
            f"or compress again"
        )
    try:
        return ResMoEFormat.model_validate(dict(block))
    except ValidationError as err:
        first = err.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "quantization_config"
        raise FormatError(f"{where}: quantization_config: {key}: {first['msg']}") from err
