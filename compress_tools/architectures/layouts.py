"""The ways that checkpoints lay experts out: one by one, or stacked in 3-D tensors. Names and shapes; nothing is read.

Templates hold ``{layer}`` and, one by one, ``{expert}``; what stands before them (``model.``,
``model.language_model.``) is found in the checkpoint and passed as ``root``.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from compress_tools.architectures.experts import GATED, ExpertWeights, MoESizes
from compress_tools.format.schema import Projection

# (tensor name, expert's number in a stacked tensor or None) -> that matrix, vector, or whole tensor
Read = Callable[[str, int | None], Tensor]


class ExpertLayout(Protocol):
    """One way."""

    @property
    def stem(self) -> str:
        """What the names of a layer's experts begin with, behind the root; with ``{layer}``."""
        ...

    def pattern(self) -> str:
        """A regular expression for names behind the root; group ``layer`` is what stands for the layer."""
        ...

    def tensors(self, stem: str, sizes: MoESizes) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a layer's experts.

        Args:
            stem: root and ``self.stem``, the layer filled in.
            sizes: E, H, I.
        """
        ...

    def read(self, stem: str, expert: int, read: Read) -> ExpertWeights:
        """One expert."""
        ...

    def stored(self, stem: str, experts: Sequence[ExpertWeights]) -> dict[str, Tensor]:
        """All experts of a layer as tensors; the inverse of ``read``."""
        ...

    def sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> MoESizes | None:
        """E, H and I by the shapes of a layer's tensors, named behind the stem; None where they say nothing."""
        ...


@dataclass(frozen=True)
class OneByOne:
    """``<stem>.<expert>.<projection>.weight``, as most families are published.

    Attributes:
        expert: one expert's name.
        projections: projection -> last name component; two-matrix experts have no ``gate_proj``.
    """

    expert: str = "layers.{layer}.mlp.experts.{expert}"
    projections: Mapping[Projection, str] = field(default_factory=lambda: dict(GATED))

    @property
    def stem(self) -> str:
        """See ``ExpertLayout``."""
        return self.expert.partition("{expert}")[0]

    def pattern(self) -> str:
        """See ``ExpertLayout``."""
        # The first projection tells experts with a gate from those without.
        first = re.escape(next(iter(self.projections.values())))
        expert = _pattern(self.expert).replace(r"\{expert\}", r"\d+")
        return rf"{expert}\.{first}\.weight"

    def tensors(self, stem: str, sizes: MoESizes) -> dict[str, tuple[int, ...]]:
        """See ``ExpertLayout``."""
        wide, tall = (sizes.intermediate_size, sizes.hidden_size), (sizes.hidden_size, sizes.intermediate_size)
        return {
            self._name(stem, expert, projection): tall if projection == "down_proj" else wide
            for expert in range(sizes.num_experts)
            for projection in self.projections
        }

    def read(self, stem: str, expert: int, read: Read) -> ExpertWeights:
        """See ``ExpertLayout``."""
        found = {projection: read(self._name(stem, expert, projection), None) for projection in self.projections}
        return ExpertWeights(found.get("gate_proj"), found["up_proj"], found["down_proj"])

    def stored(self, stem: str, experts: Sequence[ExpertWeights]) -> dict[str, Tensor]:
        """See ``ExpertLayout``."""
        return {
            self._name(stem, number, projection): weights.matrix(projection).contiguous()
            for number, weights in enumerate(experts)
            for projection in self.projections
        }

    def sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> MoESizes | None:
        """See ``ExpertLayout``."""
        rest = re.escape(self.expert.partition("{expert}")[2])
        up = re.escape(self.projections["up_proj"])
        found = {
            int(match[1]): shape
            for name, shape in shapes.items()
            if (match := re.fullmatch(rf"(\d+){rest}\.{up}\.weight", name)) and len(shape) == 2
        }
        if not found:
            return None
        inner, hidden = next(iter(found.values()))
        return MoESizes(max(found) + 1, hidden, inner)

    def _name(self, stem: str, expert: int, projection: Projection) -> str:
        rest = self.expert.partition("{expert}")[2]
        return f"{stem}{expert}{rest}.{self.projections[projection]}.weight"


@dataclass(frozen=True)
class Stacked:
    """All experts of a layer in 3-D tensors, as transformers 5 holds them in memory and some families publish them.

    Attributes:
        experts: the module's name.
        gate_up: the one tensor of gate and up, or gate's and up's own; of two-matrix experts up's alone.
        down: down's tensor.
        transposed: inputs first: ``[E, H, 2I]`` and ``[E, I, H]``; otherwise ``[E, 2I, H]`` and ``[E, H, I]``.
        interleaved: gate and up alternate; otherwise gate's half comes first.
        bias: what a bias's name ends with; empty without biases.
        gated: experts have a gate.
    """

    experts: str = "layers.{layer}.mlp.experts"
    gate_up: tuple[str, ...] = ("gate_up_proj",)
    down: str = "down_proj"
    transposed: bool = False
    interleaved: bool = False
    bias: str = ""
    gated: bool = True

    @property
    def stem(self) -> str:
        """See ``ExpertLayout``."""
        return f"{self.experts}."

    @property
    def _halves(self) -> int:
        return 2 if self.gated and len(self.gate_up) == 1 else 1

    def pattern(self) -> str:
        """See ``ExpertLayout``."""
        return rf"{_pattern(self.experts)}\.{re.escape(self.gate_up[0])}"

    def tensors(self, stem: str, sizes: MoESizes) -> dict[str, tuple[int, ...]]:
        """See ``ExpertLayout``."""
        count, hidden, inner = sizes.num_experts, sizes.hidden_size, sizes.intermediate_size
        wide = self._halves * inner
        found: dict[str, tuple[int, ...]] = {}
        for name in self.gate_up:
            found[stem + name] = (count, hidden, wide) if self.transposed else (count, wide, hidden)
            if self.bias:
                found[stem + name + self.bias] = (count, wide)
        found[stem + self.down] = (count, inner, hidden) if self.transposed else (count, hidden, inner)
        if self.bias:
            found[stem + self.down + self.bias] = (count, hidden)
        return found

    def read(self, stem: str, expert: int, read: Read) -> ExpertWeights:
        """See ``ExpertLayout``."""

        def matrix(name: str) -> Tensor:
            found = read(stem + name, expert)
            return found.T if self.transposed else found

        gate, up = self._split([matrix(name) for name in self.gate_up])
        biases: dict[Projection, Tensor] = {}
        if self.bias:
            gate_bias, up_bias = self._split([read(stem + name + self.bias, expert) for name in self.gate_up])
            own: dict[Projection, Tensor | None] = {
                "gate_proj": gate_bias,
                "up_proj": up_bias,
                "down_proj": read(stem + self.down + self.bias, expert),
            }
            biases = {projection: bias for projection, bias in own.items() if bias is not None}
        return ExpertWeights(gate, up, matrix(self.down), biases)

    def stored(self, stem: str, experts: Sequence[ExpertWeights]) -> dict[str, Tensor]:
        """See ``ExpertLayout``."""

        def stack(parts: Iterable[Tensor]) -> Tensor:
            return torch.stack([part.T if self.transposed and part.dim() == 2 else part for part in parts]).contiguous()

        joined = [self._join(weights.gate, weights.up) for weights in experts]
        found = {stem + name: stack(parts[number] for parts in joined) for number, name in enumerate(self.gate_up)}
        found[stem + self.down] = stack(weights.down for weights in experts)
        if self.bias:
            biases = [weights.biases for weights in experts]
            joined = [self._join(own.get("gate_proj"), own["up_proj"]) for own in biases]
            for number, name in enumerate(self.gate_up):
                found[stem + name + self.bias] = stack(parts[number] for parts in joined)
            found[stem + self.down + self.bias] = stack(own["down_proj"] for own in biases)
        return found

    def sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> MoESizes | None:
        """See ``ExpertLayout``."""
        wide, down = shapes.get(self.gate_up[0]), shapes.get(self.down)
        if wide is None or down is None or len(wide) != 3 or len(down) != 3:
            return None
        inner, hidden = down[1:] if self.transposed else down[:0:-1]
        return MoESizes(wide[0], hidden, inner)

    def _split(self, parts: list[Tensor]) -> tuple[Tensor | None, Tensor]:
        """Gate (None without one) and up, rows first, of what ``gate_up`` names."""
        if not self.gated:
            return None, parts[0]
        if len(parts) == 2:
            return parts[0], parts[1]
        whole = parts[0]
        if self.interleaved:
            return whole[::2], whole[1::2]
        half = len(whole) // 2
        return whole[:half], whole[half:]

    def _join(self, gate: Tensor | None, up: Tensor) -> list[Tensor]:
        """The inverse of ``_split``."""
        if gate is None:
            return [up]
        if len(self.gate_up) == 2:
            return [gate, up]
        return [interleave(gate, up) if self.interleaved else torch.cat([gate, up])]


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of gate and up in turn: ``[I, ...]`` twice to ``[2I, ...]``."""
    return torch.stack([gate, up], 1).flatten(0, 1)


def _pattern(template: str) -> str:
    return re.escape(template).replace(r"\{layer\}", r"(?P<layer>{layer})")
