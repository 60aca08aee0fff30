"""What the user asks for: one validated object, made before any weight is read. The CLI's options derive from it."""

import os
import re
from dataclasses import dataclass
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress_tools.errors import ConfigError

T = TypeVar("T")
AnyModel = TypeVar("AnyModel", bound=BaseModel)
Method = Literal["prune", "low-rank"]
Center = Literal["barycenter", "git-rebasin", "mean", "none"]


def default_workers() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class CompressionConfig(BaseModel):
    """The recipe. ``device`` and ``workers`` change how fast it goes, not what it makes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = Field(
        "prune",
        description="Residual coder: magnitude pruning (bitmap + values) or low rank (joint SVD of the design matrix).",
    )
    retain_ratio: float = Field(
        0.25,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Share of each residual's parameters that is kept, in (0, 1]; 1 is lossless up to rounding.",
    )
    layers: str = Field(
        "all",
        description="Which MoE layers: all; top:N, bottom:N (N layers nearest the output, the input); or 0-3,7.",
    )
    center: Center = Field(
        "barycenter",
        description="Center expert: Wasserstein barycenter; or, for comparison, the mean after Git Re-Basin's matching "
        "to expert 0, the plain mean, or none.",
    )
    max_iterations: int = Field(25, ge=1, description="Most barycenter fixed-point iterations of each start.")
    tolerance: float = Field(
        1e-4,
        ge=0,
        allow_inf_nan=False,
        description="Stop when the barycenter objective falls by less, relatively.",
    )
    seed: int = Field(0, ge=0, description="Seed of randomised steps.")
    device: str = Field("cpu", description="Where products and factorisations run: cpu, cuda, cuda:N.")
    workers: int = Field(
        default_factory=default_workers,
        ge=1,
        description="Assignments solved in parallel. [default: the number of cores]",
    )

    def recipe(self) -> dict[str, object]:
        """What determines the output: every field but ``device`` and ``workers``."""
        return self.model_dump(exclude={"device", "workers"})


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
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"{option}: {first['msg']}, found {first['input']!r}") from err


@dataclass(frozen=True)
class Slice:
    """``--shard number/count``: one of ``count`` parts of the work, numbered from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, items: list[T]) -> list[T]:
        """This part of ``items``: neighbours, and as many as in any other part, or one more."""
        return items[len(items) * (self.number - 1) // self.count : len(items) * self.number // self.count]


def make_slice(text: str) -> Slice:
    """Read ``--shard``.

    Args:
        text: ``i/n`` with ``1 <= i <= n``.
    Raises:
        ConfigError: names the value found and the rule.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip(), re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--shard {text}: expected I/N with 1 <= I <= N, such as 1/4")
    return Slice(int(match[1]), int(match[2]))


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


def select_layers(selection: str, moe_layers: list[int]) -> list[int]:
    """Resolve ``--layers`` against a model's MoE layers.

    Args:
        selection: ``all``, ``top:N``, ``bottom:N``, or comma-separated indices and ranges (``0-3,7``).
        moe_layers: decoder layer indices that hold experts, ascending.
    Returns:
        the selected decoder layer indices, ascending.
    Raises:
        ConfigError: not understood, or names a layer without experts.
    """
    text = selection.strip().lower()
    if text == "all":
        return list(moe_layers)
    end, colon, number = text.partition(":")
    if colon and end in ("top", "bottom") and number.isdecimal():
        count = int(number)
        if not 1 <= count <= len(moe_layers):
            raise ConfigError(f"--layers {selection}: the model has {len(moe_layers)} MoE layers")
        return moe_layers[-count:] if end == "top" else moe_layers[:count]
    chosen: set[int] = set()
    for item in text.split(","):
        first, dash, last = item.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ConfigError(
                f"--layers {selection}: expected all, top:N, bottom:N, or indices and ranges such as 0-3,7"
            )
        chosen.update(range(int(first), int(last or first) + 1))
    if unknown := chosen - set(moe_layers):
        raise ConfigError(
            f"--layers {selection}: no experts in layers {sorted(unknown)}; MoE layers are {_spans(moe_layers)}"
        )
    return sorted(chosen)


def _spans(indices: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2,5``."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
