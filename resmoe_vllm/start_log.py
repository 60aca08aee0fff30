"""What a start says once, in one block: how layers are coded, what experts take up against dense ones, their kernel."""

import logging
from dataclasses import dataclass

from torch import nn

# vLLM formats and shows what is logged below its own name, and nothing else of this level.
log = logging.getLogger("vllm.resmoe")


@dataclass(frozen=True)
class LoadedLayer:
    """One layer on this rank.

    Attributes:
        coding: in words.
        experts: that are here.
        held: bytes of its parameters and buffers.
        dense: bytes of the same experts, or this rank's part of each, uncompressed in the model's dtype.
    """

    coding: str
    experts: int
    held: int
    dense: int


class StartLog:
    """A model's compressed layers on one rank, told once the last of them is bound to its kernel.

    Layers that come later, a draft's, are told in a block of their own.
    """

    def __init__(self) -> None:
        self._open: set[int] = set()
        self._loaded: dict[int, LoadedLayer] = {}

    def expect(self, index: int) -> None:
        """A layer has parameters, and will be loaded."""
        self._open.add(index)

    def add(self, index: int, layer: LoadedLayer, kernel: str) -> None:
        """A layer is bound.

        Args:
            index: its number.
            layer: what it holds.
            kernel: that serves it, in words.
        """
        self._loaded[index] = layer
        self._open.discard(index)
        if not self._open:
            log.info("%s", block(self._loaded, kernel))
            self._loaded = {}


def block(layers: dict[int, LoadedLayer], kernel: str) -> str:
    """The text, a line for each coding."""
    codings: dict[str, list[int]] = {}
    for index in sorted(layers):
        codings.setdefault(layers[index].coding, []).append(index)
    held, dense = (sum(getattr(layer, name) for layer in layers.values()) for name in ("held", "dense"))
    lines = [
        f"resmoe: {len(layers)} compressed MoE layers",
        *(f"  {_ranges(indices)}: {coding}" for coding, indices in codings.items()),
        f"  experts on this rank: {held / 1e6:,.1f} MB in memory, dense {dense / 1e6:,.1f} MB ({held / dense:.1%})"
        if dense
        else "  no experts on this rank",
        f"  kernel: {kernel}",
    ]
    return "\n".join(lines)


def held_bytes(layer: nn.Module) -> int:
    """Bytes of a layer's parameters and buffers."""
    return sum(tensor.untyped_storage().nbytes() for tensor in (*layer.parameters(), *layer.buffers()))


def _ranges(indices: list[int]) -> str:
    """Sorted numbers in words: ``layers 0-3, 5``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"layer{'s' if len(indices) > 1 else ''} {shown}"
