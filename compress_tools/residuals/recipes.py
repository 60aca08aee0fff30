"""From what the user asks for to how a layer is stored: CLI method -> parts. A new method is one function, one line."""

from collections.abc import Callable

from compress_tools.config import CompressionConfig
from compress_tools.format.schema import (
    BitmapResidual,
    DenseCenter,
    LayerSpec,
    LowRankResidual,
    Projection,
    QuantizedCenter,
    QuantizedResidual,
    ResidualPart,
    RowBitmapResidual,
)
from compress_tools.residuals.budget import affordable_rank, kept_per_row, kept_values

Projections = tuple[Projection, ...]
# (config, projections, I, H) -> parts
Recipe = Callable[[CompressionConfig, Projections, int, int], tuple[ResidualPart, ...]]


def uniform_spec(
    config: CompressionConfig, projections: Projections, intermediate_size: int, hidden_size: int
) -> LayerSpec:
    """How a config stores every layer that it compresses.

    Raises:
        ConfigError: the retain ratio keeps nothing.
    """
    center = ()
    if config.center != "none":
        center = (
            DenseCenter(projections=projections)
            if config.center_bits == 16
            else QuantizedCenter(
                projections=projections, bits=config.center_bits, group_size=config.group_size or None
            ),
        )
    residual = RECIPES[config.method](config, projections, intermediate_size, hidden_size)
    return LayerSpec(center=center, residual=residual)


def _prune(config: CompressionConfig, projections: Projections, rows: int, hidden: int) -> tuple[ResidualPart, ...]:
    value_bits = None if config.value_bits == 16 else config.value_bits
    group_size = None if value_bits is None else config.group_size or None
    if config.prune_rows == "equal":
        count = kept_per_row(hidden, config.retain_ratio)
        return (
            RowBitmapResidual(
                projections=projections, values_per_row=count, value_bits=value_bits, group_size=group_size
            ),
        )
    count = kept_values(rows, len(projections) * hidden, config.retain_ratio)
    return (
        BitmapResidual(projections=projections, values_per_expert=count, value_bits=value_bits, group_size=group_size),
    )


def _low_rank(config: CompressionConfig, projections: Projections, rows: int, hidden: int) -> tuple[ResidualPart, ...]:
    shared_by = [projections] if config.low_rank_form == "joint" else [(projection,) for projection in projections]
    return tuple(
        LowRankResidual(
            projections=group,
            rank=affordable_rank(rows, len(group) * hidden, config.retain_ratio),
            factor_bits=None if config.factor_bits == 16 else config.factor_bits,
        )
        for group in shared_by
    )


def _quantize(config: CompressionConfig, projections: Projections, rows: int, hidden: int) -> tuple[ResidualPart, ...]:
    return (QuantizedResidual(projections=projections, bits=config.bits, group_size=config.group_size or None),)


def _low_rank_and_quantize(
    config: CompressionConfig, projections: Projections, rows: int, hidden: int
) -> tuple[ResidualPart, ...]:
    return (*_low_rank(config, projections, rows, hidden), *_quantize(config, projections, rows, hidden))


RECIPES: dict[str, Recipe] = {
    "prune": _prune,
    "low-rank": _low_rank,
    "quantize": _quantize,
    "low-rank+quantize": _low_rank_and_quantize,
}
