"""From what the user asks for to how a layer is stored: a row for each ``--method``, by the coders' recipes."""

from typing import Literal

from compress_tools.config import CompressionConfig, Method
from compress_tools.format.schema import (
    CenterPart,
    DenseCenter,
    GroupSize,
    LayerSpec,
    Projection,
    QuantizedCenter,
    ResidualPart,
)
from compress_tools.residuals.base import Recipe
from compress_tools.residuals.low_rank import low_rank_parts
from compress_tools.residuals.prune import pruned_parts
from compress_tools.residuals.quantize import quantized_parts


def _low_rank_and_quantized_parts(
    config: CompressionConfig, projections: tuple[Projection, ...], intermediate_size: int, hidden_size: int
) -> tuple[ResidualPart, ...]:
    """The remainder of low rank in codes."""
    recipes: tuple[Recipe, ...] = (low_rank_parts, quantized_parts)
    return tuple(part for recipe in recipes for part in recipe(config, projections, intermediate_size, hidden_size))


RECIPES: dict[Method, Recipe] = {
    "prune": pruned_parts,
    "low-rank": low_rank_parts,
    "quantize": quantized_parts,
    "low-rank+quantize": _low_rank_and_quantized_parts,
}


def uniform_spec(
    config: CompressionConfig, projections: tuple[Projection, ...], intermediate_size: int, hidden_size: int
) -> LayerSpec:
    """How a config stores every layer that it compresses.

    Raises:
        ConfigError: the retain ratio keeps nothing.
    """
    center: tuple[CenterPart, ...] = ()
    if config.center != "none":
        center = (center_part(config.center_bits, projections, config.group_size or None),)
    residual = RECIPES[config.method](config, projections, intermediate_size, hidden_size)
    return LayerSpec(center=center, residual=residual)


def center_part(
    bits: Literal[16, 8, 4], projections: tuple[Projection, ...], group_size: GroupSize | None
) -> CenterPart:
    """How a center is stored: in 16 bits, the model's dtype, as it is; else as codes."""
    if bits == 16:
        return DenseCenter(projections=projections)
    return QuantizedCenter(projections=projections, bits=bits, group_size=group_size)
