"""Block sizes of the Triton kernels: tuned per shape in configs/*.json, else by rule from the number of tokens.

A file is named by experts, sizes, device, dtype and coders, and holds one entry for each tuned token count, as
vLLM's own fused MoE has it; ``python -m benchmarks.kernels.tune`` writes it. The nearest token count is taken.
"""

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).parent / "configs"
# Up to here a layer is bound by the bytes of its weights: 16-row blocks, split contractions, fp32 between launches.
FEW_TOKENS = 64


@dataclass(frozen=True)
class Blocks:
    """One launch: columns of a program, length of a step of the contraction, warps, pipeline stages."""

    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """All launches of a layer.

    Attributes:
        block_m: rows of a block of pairs; 16 at the least, for the matrix units.
        first: the center's gate and up, and ``x V^T``.
        hidden: gate and up of each pair.
        shrink: ``a U``.
        last: the down projections.
        restore: add the center to a decoded tile and take one product, instead of the center's own product once per
            token. Only where a projection has more than low rank.
        programs: contractions are split until a launch has about this many programs.
    """

    block_m: int
    first: Blocks
    hidden: Blocks
    shrink: Blocks
    last: Blocks
    restore: bool
    programs: int

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Config":
        """Inverse of ``dataclasses.asdict``."""
        blocks = {name: Blocks(**fields[name]) for name in ("first", "hidden", "shrink", "last")}
        return cls(**{**fields, **blocks})


def default_config(tokens: int, top_k: int, experts: int, coders: frozenset[str]) -> Config:
    """The rule where nothing was tuned; not yet measured.

    Args:
        tokens: T.
        top_k: K.
        experts: on this rank.
        coders: the layer's.
    """
    if tokens <= FEW_TOKENS:
        few = Blocks(n=32, k=128, warps=4, stages=4)
        if any(coder.startswith("bitmap") for coder in coders):
            # Steps of 32 columns leave a decoded tile where the matrix units take it, with no copy through shared
            # memory; rows are long in the last launch, as what lies left of a block must be counted.
            hidden, last = Blocks(n=32, k=32, warps=4, stages=3), Blocks(n=128, k=64, warps=4, stages=3)
        elif "quantized" in coders:
            hidden, last = Blocks(n=32, k=64, warps=4, stages=3), Blocks(n=64, k=64, warps=4, stages=3)
        elif "dense" in coders:
            hidden, last = Blocks(n=32, k=128, warps=4, stages=3), few
        else:
            # longer steps spill: a thread adds up the slabs of two tiles
            hidden, last = Blocks(n=32, k=64, warps=4, stages=4), few
        return Config(16, few, hidden, few, last, False, 528)
    per_expert = tokens * top_k / experts
    block_m = 32 if per_expert <= 24 else 64 if per_expert <= 96 else 128
    warps = 8 if block_m == 128 else 4
    wide = Blocks(n=128, k=64, warps=warps, stages=3)
    hidden = Blocks(n=64, k=64, warps=warps, stages=3)
    return Config(block_m, wide, hidden, hidden, wide, True, 264)


def config_file(
    experts: int, hidden: int, intermediate: int, device: str, dtype: torch.dtype, coders: frozenset[str]
) -> str:
    """File name of a shape's tuned sizes."""
    kind = str(dtype).removeprefix("torch.")
    device = device.replace(" ", "_")
    method = "+".join(sorted(coders))
    return f"E={experts},H={hidden},I={intermediate},device_name={device},dtype={kind},method={method}.json"


@cache
def tuned_configs(path: Path) -> dict[int, Config]:
    """Token count -> sizes; empty where there is no such file."""
    if not path.exists():
        return {}
    return {int(tokens): Config.from_dict(fields) for tokens, fields in json.loads(path.read_text()).items()}


def write_configs(path: Path, configs: dict[int, Config]) -> None:
    """Write a shape's tuned sizes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {str(tokens): asdict(config) for tokens, config in sorted(configs.items())}
    path.write_text(json.dumps(text, indent=2) + "\n")


def pick_config(
    tokens: int,
    top_k: int,
    experts: int,
    hidden: int,
    intermediate: int,
    device: str,
    dtype: torch.dtype,
    coders: frozenset[str],
) -> Config:
    """Tuned for the nearest token count, or by rule."""
    tuned = tuned_configs(CONFIGS / config_file(experts, hidden, intermediate, device, dtype, coders))
    if tuned:
        return tuned[min(tuned, key=lambda count: (abs(count - tokens), count))]
    return default_config(tokens, top_k, experts, coders)
