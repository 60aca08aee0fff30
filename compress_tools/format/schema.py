"""The ``quantization_config`` block of a ResMoE checkpoint: frozen, versioned, unknown keys refused (SPEC.md, 2)."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from compress_tools.errors import FormatError

FORMAT_VERSION = 1
QUANT_METHOD = "resmoe"

Projection = Literal["gate_proj", "up_proj", "down_proj"]
WeightDtype = Literal["float32", "float16", "bfloat16"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DenseCenter(_Frozen):
    """Center rows stored as they are, one ``[I, H]`` tensor per projection."""

    method: Literal["dense"] = "dense"
    projections: tuple[Projection, ...] = Field(min_length=1)


class BitmapResidual(_Frozen):
    """Pruned residual: one bit per weight, then the kept values. The count is shared by the group."""

    method: Literal["bitmap"] = "bitmap"
    projections: tuple[Projection, ...] = Field(min_length=1)
    values_per_expert: PositiveInt


class LowRankResidual(_Frozen):
    """``U @ V``: U ``[I, R]`` shared by the group's projections, V ``[R, H]`` for each."""

    method: Literal["low_rank"] = "low_rank"
    projections: tuple[Projection, ...] = Field(min_length=1)
    rank: PositiveInt


CenterPart = DenseCenter
ResidualPart = Annotated[BitmapResidual | LowRankResidual, Field(discriminator="method")]


class LayerSpec(_Frozen):
    """How one MoE layer is stored: restored expert = sum of center parts + sum of residual parts.

    An empty ``center`` means no center (the residual is the weight itself).
    """

    center: tuple[CenterPart, ...]
    residual: tuple[ResidualPart, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _each_method_once_per_projection(self) -> "LayerSpec":
        for parts in (self.center, self.residual):
            seen = [(part.method, projection) for part in parts for projection in part.projections]
            if len(seen) != len(set(seen)):
                raise ValueError(f"a projection is covered twice by the same method: {seen}")
        return self


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
    format_version: Literal[1] = FORMAT_VERSION
    written_by: str
    dtype: WeightDtype
    num_experts: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    biases: bool = False
    names: ExpertNames
    layers: dict[int, LayerSpec]

    @model_validator(mode="after")
    def _layers_fit(self) -> "ResMoEFormat":
        known = set(self.names.projections)
        for index, layer in self.layers.items():
            if index < 0:
                raise ValueError(f"layer index {index} is negative")
            for part in (*layer.center, *layer.residual):
                if unknown := set(part.projections) - known:
                    raise ValueError(f"layer {index}: projections {sorted(unknown)} are not in names.projections")
            covered = {projection for part in layer.residual for projection in part.projections}
            if covered != known:
                raise ValueError(f"layer {index}: residual covers {sorted(covered)}, expected {sorted(known)}")
            for part in layer.residual:
                self._check_size(index, part)
        return self

    def _check_size(self, index: int, part: BitmapResidual | LowRankResidual) -> None:
        columns = len(part.projections) * self.hidden_size
        if part.method == "bitmap" and part.values_per_expert > self.intermediate_size * columns:
            raise ValueError(
                f"layer {index}: values_per_expert {part.values_per_expert} exceeds the "
                f"{self.intermediate_size * columns} weights it is drawn from"
            )
        if part.method == "low_rank" and part.rank > min(self.intermediate_size, columns):
            raise ValueError(
                f"layer {index}: rank {part.rank} exceeds min(I, columns) = {min(self.intermediate_size, columns)}"
            )


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
    if block.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{where}: ResMoE format_version {block.get('format_version')!r} is not readable by this version, "
            f"which reads {FORMAT_VERSION}; install the version that wrote it, or compress again"
        )
    try:
        return ResMoEFormat.model_validate(dict(block))
    except ValidationError as err:
        first = err.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "quantization_config"
        raise FormatError(f"{where}: quantization_config: {key}: {first['msg']}") from err
