"""What the user asks for: one validated object, made before any weight is read. The CLI's options derive from it."""

import os
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compress_tools.errors import ConfigError

AnyModel = TypeVar("AnyModel", bound=BaseModel)
Method = Literal["prune", "low-rank", "quantize", "low-rank+quantize", "trellis", "low-rank+trellis"]
CenterBits = Literal[16, 8, 4, 3, 2]
RestBits = Literal[16, 8]
CenterCoder = Literal["codes", "trellis"]
Center = Literal["barycenter", "git-rebasin", "mean", "none"]


def default_workers() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_LOW_RANK_SHARE = {"low-rank+quantize": 0.02, "low-rank+trellis": 0.02}


def _default_ratio(given: dict[str, Any]) -> float:
    return _LOW_RANK_SHARE.get(given.get("method", ""), 0.25)


def _default(model: type[BaseModel], name: str) -> object:
    return model.model_fields[name].default


# Where a default depends on the method: that of a method that has no use for it.
_DEFAULTS: dict[str, object] = {"retain_ratio": 0.25, "group_size": 128}


def _default_group(given: dict[str, Any]) -> Literal[0, 128]:
    # A trellis makes so much of each bit that scales for groups seldom earn theirs.
    return 0 if "trellis" in given.get("method", "") else 128


class CompressionConfig(BaseModel):
    """The recipe. ``device`` and ``workers`` change how fast it goes, not what it makes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # The paper's own; the command line plans where no method is named.
    method: Method = Field(
        default_factory=lambda: "prune",
        description="One coder for all residuals: magnitude pruning (bitmap + values), low rank (SVD), plain codes or "
        "trellis codes of every weight, or low rank with its remainder in either. [default: none, the planner chooses]",
    )
    retain_ratio: float = Field(
        default_factory=_default_ratio,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Share of each residual's parameters that pruning or low rank keeps, in (0, 1]; 1 is lossless up "
        "to rounding. [default: 0.25; with low-rank+quantize and low-rank+trellis 0.02]",
    )
    bits: Literal[1, 2, 3, 4, 8] = Field(
        4, description="Bits of each weight's code: 2, 3, 4, 8 of plain codes, 1, 2, 3, 4 of trellis codes."
    )
    group_size: Literal[0, 32, 64, 128] = Field(
        default_factory=_default_group,
        description="Columns that share a scale wherever codes are stored; 0: the whole row. Factors always take whole "
        "rows. [default: 128; with trellis codes 0]",
    )
    value_bits: Literal[16, 8, 4] = Field(16, description="Bits of a kept value (prune); 16 is the model's dtype.")
    prune_rows: Literal["global", "equal"] = Field(
        "global",
        description="Keep the largest values of the whole design matrix, or equally many in every row (prune).",
    )
    factor_bits: Literal[16, 8] = Field(16, description="Bits of the factors (low-rank); 16 is the model's dtype.")
    low_rank_form: Literal["joint", "per-projection"] = Field(
        "joint", description="One SVD of gate, up and down with U shared, or one SVD for each (low-rank)."
    )
    layers: str = Field(
        "all",
        description="Which MoE layers: all; decoder (no drafts, MTP); top:N, bottom:N (N layers nearest the output, "
        "the input); or 0-3,7.",
    )
    center: Center = Field(
        "barycenter",
        description="Center expert: Wasserstein barycenter; or, for comparison, the mean after Git Re-Basin's matching "
        "to expert 0, the plain mean, or none.",
    )
    center_bits: CenterBits = Field(16, description="Bits of the center; 16 is the model's dtype.")
    center_coder: CenterCoder = Field("codes", description="Codes of a center of fewer bits: plain or trellis codes.")
    rest_bits: RestBits = Field(
        16,
        description="Bits of all that is no routed expert: 16 leaves it as it is; 8 stores attention, dense layers, "
        "shared experts, embedding and output layer in codes by row. Routers, norms and biases stay exact.",
    )
    max_iterations: int = Field(25, ge=1, description="Most barycenter fixed-point iterations of each start.")
    tolerance: float = Field(
        1e-4,
        ge=0,
        allow_inf_nan=False,
        description="Stop when the barycenter objective falls by less, relatively.",
    )
    seed: int = Field(0, ge=0, description="Seed of randomised steps.")
    calibration: str | None = Field(
        None,
        description="What errors count, a file of `resmoe calibrate SRC --out FILE`: coders spend bits where the "
        "model's output depends on them. [default: no data]",
    )
    device: str = Field("cpu", description="Where products and factorisations run: cpu, cuda, cuda:N.")
    workers: int = Field(
        default_factory=default_workers,
        ge=1,
        description="Assignments solved in parallel. [default: the number of cores]",
    )

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Self:
        for name, why in self.without_effect().items():
            default = _DEFAULTS.get(name, type(self).model_fields[name].default)
            if getattr(self, name) != default:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} has no effect with {why}")
        return self

    @model_validator(mode="after")
    def _codes_of_that_width(self) -> Self:
        _ = self.trellis_bits if "trellis" in self.method else self.plain_bits
        if self.center_bits == 8 and self.center_coder == "trellis":
            raise ValueError("--center-bits 8: trellis codes have 2, 3 or 4; --center-coder codes has 8")
        return self

    @property
    def plain_bits(self) -> Literal[2, 3, 4, 8]:
        """``bits`` of plain codes."""
        if self.bits == 1:
            raise ValueError(f"--bits 1: only trellis codes have it; with --method {self.method} 2, 3, 4 or 8")
        return self.bits

    @property
    def trellis_bits(self) -> Literal[1, 2, 3, 4]:
        """``bits`` of trellis codes."""
        if self.bits == 8:
            plain = self.method.replace("trellis", "quantize")
            raise ValueError(f"--bits 8: trellis codes have 1, 2, 3 or 4; --method {plain} has 8")
        return self.bits

    def without_effect(self) -> dict[str, str]:
        """Fields that change nothing here, and the choice that makes it so."""
        prunes, factors = self.method == "prune", "low-rank" in self.method
        codes = "quantize" in self.method or "trellis" in self.method
        applies = {
            "retain_ratio": prunes or factors,
            "bits": codes,
            "group_size": codes or (prunes and self.value_bits != 16) or self.center_bits != 16,
            "value_bits": prunes,
            "prune_rows": prunes,
            "factor_bits": factors,
            "low_rank_form": factors,
            "center_bits": self.center != "none",
            "center_coder": self.center != "none" and self.center_bits != 16,
        }
        return {name: self._why_not(name) for name, has_effect in applies.items() if not has_effect}

    def _why_not(self, name: str) -> str:
        if name in ("center_bits", "center_coder") and self.center == "none":
            return "--center none"
        if name == "center_coder":
            return "--center-bits 16"
        if name == "group_size":
            return f"--method {self.method}, which stores no codes here"
        return f"--method {self.method}"

    def recipe(self) -> dict[str, object]:
        """What determines the output: every field but ``device`` and ``workers``; a newer one only where it is used.

        Of ``calibration`` that is the file's content, which its reader knows.
        """
        newer = {name for name in ("center_coder", "rest_bits") if getattr(self, name) == _default(type(self), name)}
        return self.model_dump(exclude={"device", "workers", "calibration", *newer})


def make_config(**options: object) -> CompressionConfig:
    """Build a config from keyword options.

    Raises:
        ConfigError: names the option, the value found and the rule.
    """
    return validated(CompressionConfig, options)


def validated(model: type[AnyModel], options: dict[str, object]) -> AnyModel:
    """An options model from keyword options; its field names are the CLI's options.

    Raises:
        ConfigError: names the option, the value found and the rule.
    """
    try:
        return model(**options)
    except ValidationError as err:
        first = err.errors()[0]
        if not first["loc"]:
            raise ConfigError(str(first["ctx"]["error"])) from err
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"{option}: {first['msg']}, found {first['input']!r}") from err


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ConfigError: not a device, or no usable CUDA device.
    """
    import torch  # seconds of loading, which `resmoe --help` need not take

    try:
        kind = torch.device(device).type
    except RuntimeError as err:
        raise ConfigError(f"--device {device}: not a device; expected cpu, cuda or cuda:N") from err
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: this machine has no usable CUDA device; use --device cpu")
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: expected cpu, cuda or cuda:N")
