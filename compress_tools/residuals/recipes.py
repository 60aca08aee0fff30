"""From what the user asks for to how a layer is stored: a row for each ``--method``, by the coders' recipes."""

from compress_tools.config import CenterBits, CenterCoder, CompressionConfig, Method
from compress_tools.format.schema import (
    CenterPart,
    DenseCenter,
    GroupSize,
    LayerSpec,
    Projection,
    QuantizedCenter,
    ResidualPart,
    TrellisCenter,
)
from compress_tools.residuals.base import Recipe
from compress_tools.residuals.low_rank import low_rank_parts
from compress_tools.residuals.prune import pruned_parts
from compress_tools.residuals.quantize import quantized_parts
from compress_tools.residuals.trellis import trellis_parts


def _together(*recipes: Recipe) -> Recipe:
    """Each codes what the one before it leaves."""

    def parts(
        config: CompressionConfig, projections: tuple[Projection, ...], rows: int, columns: int, /
    ) -> tuple[ResidualPart, ...]:
        return tuple(part for recipe in recipes for part in recipe(config, projections, rows, columns))

    return parts


RECIPES: dict[Method, Recipe] = {
    "prune": pruned_parts,
    "low-rank": low_rank_parts,
    "quantize": quantized_parts,
    "low-rank+quantize": _together(low_rank_parts, quantized_parts),
    "trellis": trellis_parts,
    "low-rank+trellis": _together(low_rank_parts, trellis_parts),
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
        center = (center_part(config.center_bits, projections, config.group_size or None, config.center_coder),)
    residual = RECIPES[config.method](config, projections, intermediate_size, hidden_size)
    return LayerSpec(center=center, residual=residual)


def center_part(
    bits: CenterBits,
    projections: tuple[Projection, ...],
    group_size: GroupSize | None,
    coder: CenterCoder = "codes",
) -> CenterPart:
    """How a center is stored: in 16 bits, the model's dtype, as it is; else as codes, plain or of a trellis."""
    if bits == 16:
        return DenseCenter(projections=projections)
    if coder == "trellis" and bits != 8:
        return TrellisCenter(projections=projections, bits=bits, group_size=group_size)
    return QuantizedCenter(projections=projections, bits=bits, group_size=group_size)
