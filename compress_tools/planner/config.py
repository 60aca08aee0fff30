"""What the planner is asked: validated before a checkpoint is opened. The CLI's options derive from it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress_tools.config import CompressionConfig, validated
from compress_tools.errors import ConfigError
from compress_tools.source.layer_selection import select_layers

# What `resmoe compress SRC DST` plans for: about the bytes of plain 4-bit codes.
DEFAULT_BYTES_RATIO: Final = 0.25
# A calibration foresees small errors, which depend neither on the weights nor on each other. What pruning or low rank
# leave out, and 1 bit here for 8 bits there, is foreseen too low: at 25 % of the bytes such plans had 1.6 to 1.7 times
# the KL of plans without a calibration, and plans of trellis codes alone 0.7 times.
CALIBRATED_METHODS: Final = ("trellis",)
# Above, trellis codes of 4 bits can't use the bytes up: codes of 8 bits are offered too.
CALIBRATED_METHODS_ABOVE: Final = (0.3, ("trellis", "quantize"))
MENU_METHODS = ("trellis", "quantize", "prune", "low-rank", "low-rank+quantize", "low-rank+trellis")


class PlannerConfig(BaseModel):
    """The budget, and what may be spent where."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target_bytes_ratio: float | None = Field(
        None,
        gt=0,
        lt=1,
        allow_inf_nan=False,
        description="Choose how each layer and projection is stored, so that the experts take at most this share of "
        "their original bytes, everything counted, at the least total error. [default: without --method and --plan "
        f"{DEFAULT_BYTES_RATIO}; with --layers of the bytes of those layers]",
    )
    target_size: str | None = Field(
        None,
        description="The same, said by the size of all weight files together: 16GB (10^9 bytes), 16GiB (2^30), 800MB.",
    )
    optimize: Literal["error", "output"] = Field(
        "error",
        description="What is least: squared error relative to each layer's weights, or its estimated effect on each "
        "layer's output.",
    )
    calibration: str | None = Field(
        None,
        description="What errors count, a file of `resmoe calibrate SRC --out FILE`: plan and coders spend bits where "
        "the model's output depends on them. With --optimize output and a budget also a safetensors file of layers' "
        "inputs: layer.INDEX [N, H], optionally layer.INDEX.routing [N, E]. [default: no data]",
    )
    layer_bytes_ratio: str | None = Field(
        None,
        description="Bounds of single layers, as shares of their own bytes: 0-1:0.3..1,7:..0.5 (a side may be "
        "left out).",
    )
    coders: str = Field(
        "all",
        description=f"What may be chosen: all, or some of {', '.join(MENU_METHODS)}; with a file of `resmoe calibrate` "
        f"all is {CALIBRATED_METHODS[0]}, and quantize too above {CALIBRATED_METHODS_ABOVE[0]:.0%} of the bytes.",
    )
    uniform: bool = Field(default=False, description="One coder for all layers and projections: the best that fits.")
    expert_groups: Literal[1, 2] = Field(
        2, description="Let the experts of a layer that are harder to store have a rate of their own."
    )
    measure_experts: int = Field(8, ge=0, description="Measure at most so many experts of each layer; 0: all.")
    measure_rows: int = Field(512, ge=0, description="Measure at most so many rows of each; 0: all.")

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.target_bytes_ratio is None) == (self.target_size is None):
            raise ValueError("expected either --target-bytes-ratio or --target-size")
        if self.target_size is not None:
            parse_size(self.target_size)
        return self

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Self:
        from compress_tools.importance import is_calibration  # torch takes seconds, which `--help` need not

        if self.calibration is not None and self.optimize != "output" and not is_calibration(self.calibration):
            raise ValueError("--calibration has no effect with --optimize error; add --optimize output")
        self.coder_names()
        parse_bounds(self.layer_bytes_ratio)
        return self

    def coder_names(self) -> tuple[str, ...]:
        """The methods that may be chosen."""
        names = tuple(name.strip() for name in self.coders.split(","))
        if names == ("all",):
            return MENU_METHODS
        if unknown := [name for name in names if name not in MENU_METHODS]:
            raise ValueError(f"--coders {self.coders}: {unknown[0]!r} is none of {', '.join(MENU_METHODS)}")
        return names


class LayersBudget(PlannerConfig):
    """A share of the bytes of those layers alone that are compressed, in place of all experts' bytes."""

    counted: Literal["the layers compressed"] = "the layers compressed"


def default_budget(layers: str, options: dict[str, object]) -> PlannerConfig:
    """What is planned for where neither a budget nor a method is asked for.

    Args:
        layers: ``--layers``. Others stay as they are: if their bytes counted, the rest would pay for them unasked.
        options: the planner's other options.
    Raises:
        ConfigError: names the option, the value found and the rule.
    """
    kind = PlannerConfig if layers == "all" else LayersBudget
    return validated(kind, {**options, "target_bytes_ratio": DEFAULT_BYTES_RATIO})


_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}B": factor for unit, factor in _UNITS.items() if unit not in ("", "B")}
_UNITS |= {f"{unit}IB": 2 ** (10 * power) for power, unit in enumerate("KMGT", 1)}


def parse_size(text: str) -> int:
    """Bytes of ``--target-size``.

    Raises:
        ValueError: not understood.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text, re.ASCII)
    if match is None or match[2].upper() not in _UNITS or not (size := int(float(match[1]) * _UNITS[match[2].upper()])):
        raise ValueError(f"--target-size {text!r}: expected a size such as 16GB, 16GiB or 800MB")
    return size


def make_planner_config(**options: object) -> PlannerConfig:
    """Build a config from keyword options.

    Raises:
        ConfigError: names the option, the value found and the rule.
    """
    return validated(PlannerConfig, options)


@dataclass(frozen=True)
class Bounds:
    """Least and largest share of a layer's original bytes."""

    least: float = 0.0
    most: float = 1.0


def parse_bounds(text: str | None) -> list[tuple[str, Bounds]]:
    """Read ``--layer-bytes-ratio``: (layers as ``--layers`` takes them, bounds), in the order given.

    Raises:
        ValueError: not understood.
    """
    items = []
    for item in (text or "").split(",") if text is not None else []:
        match = re.fullmatch(r"\s*(\d+(?:-\d+)?)\s*:\s*([\d.]*?)\s*\.\.\s*([\d.]*?)\s*", item, re.ASCII)
        try:
            bounds = Bounds(float(match[2] or 0), float(match[3] or 1)) if match else None
        except ValueError:
            bounds = None
        if match is None or bounds is None or not 0 <= bounds.least <= bounds.most <= 1:
            raise ValueError(
                f"--layer-bytes-ratio {item!r}: expected LAYERS:LEAST..MOST with 0 <= LEAST <= MOST <= 1, such as "
                "0-1:0.3..1 or 7:..0.5"
            )
        items.append((match[1], bounds))
    return items


def layer_bounds(text: str | None, layers: list[int]) -> Mapping[int, Bounds]:
    """The bounds of each of ``layers``; a later item overrides an earlier one.

    Raises:
        ConfigError: names a layer that is not among them.
    """
    bounds = dict.fromkeys(layers, Bounds())
    for selection, given in parse_bounds(text):
        try:
            bounds |= dict.fromkeys(select_layers(selection, layers), given)
        except ConfigError as err:
            raise ConfigError(f"--layer-bytes-ratio: {str(err).removeprefix('--layers ')}") from err
    return bounds


# Options of `compress` that say how a coder is set: the planner's own choice.
CHOSEN_BY_PLANNER = (
    "method",
    "retain_ratio",
    "bits",
    "group_size",
    "value_bits",
    "prune_rows",
    "factor_bits",
    "low_rank_form",
    "center_bits",
    "center_coder",
)
# What of a recipe goes with a plan: how the centers are found.
CENTER_FIELDS = ("center", "max_iterations", "tolerance", "seed")


def center_recipe(config: CompressionConfig) -> dict[str, object]:
    """The fields of ``CENTER_FIELDS``."""
    return config.model_dump(include=set(CENTER_FIELDS))
