"""Block sizes of the Triton kernels: tuned per shape in configs/*.json, else by rule from the number of tokens.

A file is named by experts, sizes, device, dtype and coders, and holds one entry for each tuned token count, as
vLLM's own fused MoE has it; ``python -m benchmarks.kernels.tune`` writes it. The nearest token count is taken.
Either way token counts fall into a few classes, and kernels are compiled for a class: none of them in serving.
"""

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import cache, partial
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from resmoe_vllm.kernels.gpu.scratch import number_setting, scratch_limit

CONFIGS = Path(__file__).parent / "configs"
# Up to here a layer is bound by the bytes of its weights: 16-row blocks, split contractions, fp32 between launches.
FEW_TOKENS = 64
# Rows of an expert up to which blocks have 32 rows, and 64.
_FEW_ROWS, _SOME_ROWS = 24, 96
_SOME_BLOCK, _MOST_ROWS = 64, 128
_FEWEST_STAGES = 2
# Rows of an expert from which decoded weights are restored first, once for all of them; what it
# gives is measured, not from how many rows on it pays (docs/notes/gpu-kernel.md).
_RESTORED_ROWS = 64
ROWS_VARIABLE = "RESMOE_GPU_RESTORE_ROWS"
# A block's most shared memory on an H100; cards of other kinds say their own.
HOPPER_SHARED = 232448
# Of NVIDIA's cards from Ampere on the least; AMD's have less.
_LEAST_SHARED = 101376
# CUDA keeps this much of a multiprocessor's shared memory for itself, for every block.
_RESERVED = 1024
# What the class without an end is split for.
_MANY_TOKENS = 8192
# Here a launch has fewer programs than run at a time: narrow ones, with all their steps on the way at once.
_LONE_TOKENS = 1
_MOST_DECODED_ROWS = 64


class Strategy(StrEnum):
    """What becomes of tiles that are decoded, and of the center; all give the same result.

    ``CENTER_FIRST``: the center's product once per token, the decoded tile's for each pair. ``CENTER_IN_TILE``: the
    center is added to the decoded tile, one product for each pair. ``RESTORED``: that sum is written to memory once for
    all pairs of an expert, and products read plain weights. Low rank stays as it is in all three.
    """

    CENTER_FIRST = "center first"
    CENTER_IN_TILE = "center in tile"
    RESTORED = "restored"


@dataclass(frozen=True)
class Blocks:
    """One launch: columns of a program, length of a step of the contraction, warps, pipeline stages."""

    n: int
    k: int
    warps: int
    stages: int


# A warp has a row's 256 columns, eight for each lane: its counts of a bitmap don't leave it.
_RESTORE = Blocks(n=16, k=256, warps=4, stages=1)


@dataclass(frozen=True)
class Config:
    """All launches of a layer.

    Attributes:
        block_m: rows of a block of pairs; 16 at the least, for the matrix units.
        first: the center's gate and up, and ``x V^T``.
        hidden: gate and up of each pair.
        shrink: ``a U``.
        last: the down projections.
        strategy: only where a projection has more than low rank.
        programs: contractions are split until a launch has about this many programs.
        token_m: rows of a block of tokens, which all have the center's weight: fewer blocks decode it less often; 0 for
            ``block_m``.
        restore: rows (``n``) and columns (``k``) of a weight that a program restores in one step; it takes whole rows.
    """

    block_m: int
    first: Blocks
    hidden: Blocks
    shrink: Blocks
    last: Blocks
    strategy: Strategy
    programs: int
    token_m: int = 0
    restore: Blocks = _RESTORE

    @property
    def token_rows(self) -> int:
        """``token_m``, or as many rows as blocks of pairs have."""
        return self.token_m or self.block_m

    @property
    def center_in_tile(self) -> bool:
        """Whether a decoded tile, restored or not, holds the center."""
        return self.strategy != Strategy.CENTER_FIRST

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Config":
        """Inverse of ``dataclasses.asdict``."""
        blocks = {name: Blocks(**fields[name]) for name in ("first", "hidden", "shrink", "last", "restore")}
        return cls(**{**fields, **blocks, "strategy": Strategy(fields["strategy"])})


@dataclass(frozen=True)
class TokenClass:
    """Token counts that share compiled kernels.

    Attributes:
        tokens: the largest of them; contractions are split for it.
        config: their block sizes.
    """

    tokens: int
    config: Config


def default_config(
    tokens: int,
    top_k: int,
    experts: int,
    coders: frozenset[str],
    dtype: torch.dtype = torch.bfloat16,
    shared: int = HOPPER_SHARED,
) -> Config:
    """The rule where nothing was tuned.

    Args:
        tokens: T, of all ranks that share the experts.
        top_k: K.
        experts: the model's, on all ranks.
        coders: the layer's.
        dtype: the model's.
        shared: bytes of shared memory that a block may use on this card.
    """
    per_expert = tokens * top_k / experts
    restored = _is_restored(tokens, per_expert, coders, dtype)
    if restored:
        # products read plain weights
        coders = coders & {"low_rank"} | {"dense"}
    decoded = bool(coders - {"low_rank", "dense"})
    config = _rule(tokens, per_expert, coders, dtype, shared)
    if restored:
        config = replace(config, strategy=Strategy.RESTORED)
    config = _fit(config, shared, dtype.itemsize, decoded=decoded, pairs=tokens <= FEW_TOKENS)
    # On AMD both sums pass through shared memory at the end, beside what a bitmap counts.
    sums = 2 * config.block_m * config.hidden.n * torch.float32.itemsize
    if sums >= shared and any(coder.startswith("bitmap") for coder in coders):
        config = replace(config, hidden=replace(config.hidden, n=config.hidden.n // 2))
    return config


def _is_restored(tokens: int, per_expert: float, coders: frozenset[str], dtype: torch.dtype) -> bool:
    if tokens <= FEW_TOKENS or dtype == torch.float32 or not coders - {"low_rank", "dense"}:
        return False
    return scratch_limit() > 0 and per_expert > restored_rows()


def restored_rows() -> int:
    """Rows of an expert above which decoded weights are restored; ``RESMOE_GPU_RESTORE_ROWS`` has another number."""
    return number_setting(ROWS_VARIABLE, _RESTORED_ROWS)


def _rule(tokens: int, per_expert: float, coders: frozenset[str], dtype: torch.dtype, shared: int) -> Config:
    # Registers run out sooner there than on Hopper and on AMD (docs/notes/gpu-kernel.md).
    spills = _LEAST_SHARED <= shared < HOPPER_SHARED
    bitmap = any(coder.startswith("bitmap") for coder in coders)
    if dtype == torch.float32:
        return _wide_values(tokens, short=spills and bitmap)
    if tokens <= FEW_TOKENS:
        if coders == {"low_rank"}:
            return _few_low_rank(tokens)
        few = Blocks(n=32, k=128, warps=4, stages=6)
        shrink = Blocks(n=16, k=256, warps=4, stages=5) if tokens <= _LONE_TOKENS else few
        if bitmap:
            # Steps of 32 columns leave a decoded tile where the matrix units take it, with no copy through shared
            # memory; a block of the last launch begins where a pointer is.
            hidden, last = Blocks(n=32, k=32, warps=4, stages=3), Blocks(n=64, k=64, warps=4, stages=3)
        elif "trellis" in coders:
            hidden, last = Blocks(n=32, k=64, warps=4, stages=3), Blocks(n=64, k=64, warps=4, stages=3)
        elif "quantized" in coders:
            # A lane's octets of a step of 128 columns are one load.
            hidden, last = Blocks(n=32, k=128, warps=4, stages=3), Blocks(n=64, k=128, warps=4, stages=3)
        else:
            hidden, last = Blocks(n=32, k=128, warps=4, stages=3), replace(few, stages=4)
        decoded = bool(coders - {"low_rank", "dense"})
        token_m = min(_MOST_DECODED_ROWS, max(16, 1 << (tokens - 1).bit_length())) if decoded else 0
        return Config(16, few, hidden, shrink, last, Strategy.CENTER_FIRST, 528, token_m)
    block_m = 32 if per_expert <= _FEW_ROWS else _SOME_BLOCK if per_expert <= _SOME_ROWS else _MOST_ROWS
    # A decoded tile is in registers twice, as codes and as fp32: four warps spilled some of it.
    warps = 8 if block_m == 128 or coders - {"low_rank", "dense"} else 4
    wide = Blocks(n=128, k=64, warps=warps, stages=3)
    # Of trellis codes beside a center four warps spill 32 to 64 bytes there; eight none, and issue as much.
    trellis = spills and block_m == _SOME_BLOCK and "trellis" in coders
    warps = 8 if block_m == 128 or bitmap or trellis else 4
    hidden = Blocks(n=64, k=64, warps=warps, stages=3)
    expand = hidden
    if coders == {"low_rank"} and shared >= HOPPER_SHARED:
        # Of a rank's few steps. Of two sums of 128 columns some was spilled, with 8 warps and with 16.
        if block_m == _MOST_ROWS:
            expand = Blocks(n=64, k=128, warps=8, stages=2)
        elif block_m == _SOME_BLOCK:
            expand = Blocks(n=64, k=128, warps=4, stages=2)
    return Config(block_m, wide, expand, hidden, wide, Strategy.CENTER_IN_TILE, 264, max(64, block_m))


def _few_low_rank(tokens: int) -> Config:
    """As measured on an H200 with OLMoE's shape (docs/notes/gpu-kernel.md)."""
    hidden = Blocks(n=32, k=64, warps=4, stages=4)
    if tokens <= _LONE_TOKENS:
        first, last = Blocks(n=32, k=128, warps=4, stages=6), Blocks(n=64, k=128, warps=4, stages=4)
        shrink = Blocks(n=16, k=256, warps=4, stages=5)
    else:
        first, last = Blocks(n=64, k=128, warps=4, stages=4), Blocks(n=64, k=64, warps=4, stages=5)
        shrink = Blocks(n=64, k=128, warps=4, stages=4)
    return Config(16, first, hidden, shrink, last, Strategy.CENTER_FIRST, 528)


def _fit(config: Config, shared: int, itemsize: int, *, decoded: bool, pairs: bool) -> Config:
    """Fewer stages, then shorter steps, where a launch's would not fit; with ``pairs`` two blocks, if it can be."""

    def fitted(blocks: Blocks, rows: int, sides: int = 1) -> Blocks:
        size = partial(_shared_bytes, rows, itemsize=itemsize, sides=sides, decoded=decoded)
        # A block alone on a multiprocessor can't hide what it waits for, which more stages would not make up for.
        while pairs and blocks.stages > _FEWEST_STAGES:
            fewer = replace(blocks, stages=blocks.stages - 1)
            # With 16 rows Triton holds one step less than there are stages.
            if size(fewer) <= (shared - _RESERVED) // 2:
                break
            blocks = fewer
        while size(blocks) > shared:
            if blocks.stages > _FEWEST_STAGES:
                blocks = replace(blocks, stages=blocks.stages - 1)
            else:
                blocks = replace(blocks, k=blocks.k // 2)
        return blocks

    rows = max(config.block_m, config.token_rows)
    return replace(
        config,
        first=fitted(config.first, rows),
        hidden=fitted(config.hidden, config.block_m, sides=2),
        shrink=fitted(config.shrink, config.block_m),
        last=fitted(config.last, rows),
    )


def _shared_bytes(block_m: int, blocks: Blocks, *, itemsize: int, sides: int, decoded: bool) -> int:
    """At most: tiles of A and W in every stage; of decoded ones the center, codes, and what is made of them."""
    rows = block_m * blocks.k * itemsize
    tile = blocks.n * blocks.k
    plain = blocks.stages * (sides * rows + tile * itemsize)
    if not decoded:
        return plain
    return max(plain, blocks.stages * (rows + sides * tile * (itemsize + 1)) + sides * tile * itemsize)


def _wide_values(tokens: int, *, short: bool) -> Config:
    """For fp32, which the matrix units don't take: small blocks, as every product is a lane's own.

    With ``short`` steps of ``hidden`` are half as long.
    """
    few = tokens <= FEW_TOKENS
    blocks = Blocks(n=64, k=32, warps=4 if few else 8, stages=2)
    # two tiles side by side: as wide as the others' they spilled some registers
    hidden = replace(blocks, n=32, k=16 if short else 32)
    block_m = 16 if few else 32
    strategy = Strategy.CENTER_FIRST if few else Strategy.CENTER_IN_TILE
    return Config(block_m, blocks, hidden, blocks, blocks, strategy, 528 if few else 264)


def token_classes(
    top_k: int,
    experts: int,
    hidden: int,
    intermediate: int,
    device: str,
    dtype: torch.dtype,
    coders: frozenset[str],
    shared: int = HOPPER_SHARED,
) -> tuple[TokenClass, ...]:
    """All classes of a layer, fewest tokens first; the last one has no end.

    Args:
        top_k: K.
        experts: the model's, on all ranks.
        hidden: H.
        intermediate: I.
        device: as in ``config_file``.
        dtype: the model's.
        coders: the layer's.
        shared: as in ``default_config``.
    """
    tuned = tuned_configs(CONFIGS / config_file(experts, hidden, intermediate, device, dtype, coders))
    if tuned:
        counts = sorted(tuned)
        # The nearest count serves; of two as near the smaller one.
        ends = [(count + above) // 2 for count, above in pairwise(counts)] + [_MANY_TOKENS]
        classes = [TokenClass(end, tuned[count]) for end, count in zip(ends, counts, strict=True)]
        # A lone token has launches of its own.
        lone = [] if ends[0] == 1 else [TokenClass(1, tuned[counts[0]])]
        return (*lone, *classes)
    ends = [1, 4, 16, FEW_TOKENS]
    last = max(_MANY_TOKENS, 2 * _SOME_ROWS * experts // top_k)
    rows = {_FEW_ROWS, _SOME_ROWS}
    if _is_restored(last, last * top_k / experts, coders, dtype):
        # Classes begin where weights are restored; a few rows farther on, or tokens before, are not worth one.
        rows = {own for own in rows if not restored_rows() <= own <= 2 * restored_rows()}
        if restored_rows() * experts // top_k > 2 * FEW_TOKENS:
            rows.add(restored_rows())
    ends += [end for own in sorted(rows) if FEW_TOKENS < (end := own * experts // top_k) < last]
    ends.append(last)
    return tuple(TokenClass(end, default_config(end, top_k, experts, coders, dtype, shared)) for end in ends)


def invariant_class(coders: frozenset[str], dtype: torch.dtype, shared: int = HOPPER_SHARED) -> TokenClass:
    """One class for every T, with nothing split: a token's bits don't depend on its batch."""
    config = default_config(FEW_TOKENS, 1, 1, coders, dtype, shared)
    return TokenClass(_MANY_TOKENS, replace(config, programs=1, token_m=0))


def class_of(classes: Sequence[TokenClass], tokens: int) -> int:
    """Place of the class that serves a token count."""
    return min(bisect_left(classes, tokens, key=attrgetter("tokens")), len(classes) - 1)


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
    shared: int = HOPPER_SHARED,
) -> Config:
    """Block sizes of the class that serves a token count."""
    classes = token_classes(top_k, experts, hidden, intermediate, device, dtype, coders, shared)
    return classes[class_of(classes, tokens)].config
