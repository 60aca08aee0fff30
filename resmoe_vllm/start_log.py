"""What a start says once, in one block: versions, how layers are coded, bytes against dense ones, kernels, the rest."""

import logging
from dataclasses import dataclass

from torch import nn

from compress_tools.version import __version__

# vLLM formats and shows what is logged below its own name, and nothing else of this level.
log = logging.getLogger("vllm.resmoe")


@dataclass(frozen=True)
class LoadedLayer:
    """One layer on this rank.

    Attributes:
        coding: in words.
        shape: of an expert here, and its dtype, in words.
        experts: that are here.
        held: bytes of its parameters and buffers.
        dense: bytes of the same experts, or this rank's part of each, uncompressed in the model's dtype.
    """

    coding: str
    shape: str
    experts: int
    held: int
    dense: int


class StartLog:
    """A model's layers on one rank, told once the last compressed one is bound to its kernel.

    Layers that come later, a draft's, are told in a block of their own.

    Args:
        format_version: the checkpoint's.
    """

    def __init__(self, format_version: int) -> None:
        self._version = format_version
        self._clear()

    def _clear(self) -> None:
        self._open: set[int] = set()
        self._loaded: dict[int, tuple[LoadedLayer, str]] = {}
        self._left: list[int | str] = []
        self._notes: list[str] = []

    def expect(self, index: int) -> None:
        """A layer has parameters, and will be loaded."""
        self._open.add(index)

    def leave(self, layer: int | str) -> None:
        """A MoE layer, by number or name, is not compressed, and vLLM's own."""
        self._left.append(layer)

    def note(self, text: str) -> None:
        """Something that the block says too, once: what is refused, or how the rest is held."""
        if text not in self._notes:
            self._notes.append(text)

    def say(self, text: str) -> None:
        """The same, at any time: at once where no block is to come."""
        if self._open:
            self.note(text)
        else:
            log.info("resmoe: %s", text)

    def add(self, index: int, layer: LoadedLayer, kernel: str) -> None:
        """A layer is bound.

        Args:
            index: its number.
            layer: what it holds.
            kernel: that serves it, in words.
        """
        self._loaded[index] = layer, kernel
        self._open.discard(index)
        if not self._open:
            log.info("%s", self._block())
            self._clear()

    def _block(self) -> str:
        layers = {index: layer for index, (layer, _) in self._loaded.items()}
        held, dense = (sum(getattr(layer, name) for layer in layers.values()) for name in ("held", "dense"))
        codings = _by_words({index: layer.coding for index, layer in layers.items()})
        kernels = _by_words(
            {index: f"{layer.shape}: {kernel}" for index, (layer, kernel) in self._loaded.items() if layer.experts}
        )
        lines = [
            f"resmoe {__version__}, format {self._version}: {len(layers)} compressed MoE layers",
            *(f"  {_ranges(indices)}: {coding}" for coding, indices in codings.items()),
            *(f"  {name}: not compressed, vLLM's own kernel" for name in _names(self._left)),
            f"  experts on this rank: {held / 1e6:,.1f} MB in memory, dense {dense / 1e6:,.1f} MB ({held / dense:.1%})"
            if dense
            else "  no experts on this rank",
            *(
                f"  kernel for experts of {words}" if len(kernels) == 1 else f"  kernel, {_ranges(indices)}, {words}"
                for words, indices in kernels.items()
            ),
            *(f"  {text}" for text in self._notes),
        ]
        return "\n".join(lines)


def _by_words(words: dict[int, str]) -> dict[str, list[int]]:
    """Layers that have the same words, each list in order."""
    found: dict[str, list[int]] = {}
    for index in sorted(words):
        found.setdefault(words[index], []).append(index)
    return found


def _names(layers: list[int | str]) -> list[str]:
    """Numbers as ranges, and names."""
    numbers = sorted(layer for layer in layers if isinstance(layer, int))
    return [*([_ranges(numbers)] if numbers else []), *(layer for layer in layers if isinstance(layer, str))]


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
