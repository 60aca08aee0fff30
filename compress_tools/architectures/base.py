"""What the tool must know of a model family: where its experts are and how they are laid out on disk."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from compress_tools.errors import UnsupportedArchitectureError
from compress_tools.format.schema import ExpertNames, Projection

GATED: dict[Projection, str] = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
# Far beyond any model; counting up to a damaged config's number must not take for ever.
LARGEST_SIZE = 2**20
MIXTRAL_STYLE: dict[Projection, str] = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclass(frozen=True)
class ExpertWeights:
    """One expert's matrices as transformers' Linear layers hold them.

    Attributes:
        gate: ``gate_proj`` ``[I, H]``; None for two-matrix experts.
        up: ``up_proj`` ``[I, H]``.
        down: ``down_proj`` ``[H, I]``.
        biases: by projection, ``[I]`` for gate and up, ``[H]`` for down; empty without biases.
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    biases: Mapping[Projection, Tensor] = field(default_factory=dict)

    def matrix(self, projection: Projection) -> Tensor:
        """The matrix of a projection.

        Raises:
            KeyError: a two-matrix expert has no ``gate_proj``.
        """
        if projection == "gate_proj":
            if self.gate is None:
                raise KeyError(projection)
            return self.gate
        return self.up if projection == "up_proj" else self.down


@dataclass(frozen=True)
class MoESizes:
    """E ``num_experts``, H ``hidden_size``, I ``intermediate_size`` of the routed experts."""

    num_experts: int
    hidden_size: int
    intermediate_size: int


@dataclass(frozen=True)
class FusedNames:
    """Experts stored as one 3-D tensor for each of gate+up and down, as transformers 5 holds them in memory.

    Attributes:
        experts: the module's name, with ``{layer}``.
        interleaved: GPT-OSS form: ``gate_up_proj`` ``[E, H, 2I]`` with gate and up in alternating columns,
            ``down_proj`` ``[E, I, H]``, both with biases. Otherwise ``[E, 2I, H]`` (gate first), ``[E, H, I]``.
    """

    experts: str
    interleaved: bool = False


@dataclass(frozen=True)
class MoEArchitecture:
    """One model family. What differs between families is data; see docs/adding-a-family.md.

    Attributes:
        model_type: ``model_type`` of config.json.
        title: the family's name for people.
        expert: name of an expert in the checkpoint, with ``{layer}`` and ``{expert}``.
        projections: projection -> last name component on disk; two-matrix experts have no ``gate_proj``.
        num_experts_keys: config.json's keys of E, first present counts (transformers has renamed some).
        intermediate_size_keys: likewise of I.
        hidden_size_keys: likewise of H.
        fused: where fused experts are when the checkpoint holds those instead.
        per_expert_source: the family's checkpoints may store experts one by one.
        renames: (pattern, replacement) for other tensors of a fused checkpoint, to the family's usual names.
        biased: experts have biases.
        vllm: the family serves in vLLM; otherwise ``runs_in`` says where and why.
        runs_in: a sentence for families that vLLM can't serve.
    """

    model_type: str
    title: str
    expert: str = "model.layers.{layer}.mlp.experts.{expert}"
    projections: tuple[tuple[Projection, str], ...] = tuple(GATED.items())
    num_experts_keys: tuple[str, ...] = ("num_experts", "num_local_experts", "n_routed_experts")
    intermediate_size_keys: tuple[str, ...] = ("moe_intermediate_size", "intermediate_size")
    hidden_size_keys: tuple[str, ...] = ("hidden_size",)
    fused: FusedNames | None = FusedNames("model.layers.{layer}.mlp.experts")
    per_expert_source: bool = True
    renames: tuple[tuple[str, str], ...] = ()
    biased: bool = False
    vllm: bool = True
    runs_in: str = ""

    def sizes(self, config: dict[str, Any]) -> MoESizes:
        """Read E, H and I from config.json.

        Raises:
            UnsupportedArchitectureError: a key is missing or not a positive whole number.
        """
        values = []
        for keys in (self.num_experts_keys, self.hidden_size_keys, self.intermediate_size_keys):
            key = next((key for key in keys if key in config), " or ".join(keys))
            values.append(self.whole_number(key, config.get(key)))
        return MoESizes(*values)

    def whole_number(self, key: str, value: object) -> int:
        """A size or count of config.json.

        Raises:
            UnsupportedArchitectureError: not a positive whole number, or so large that counting up to it takes long.
        """
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_SIZE:
            raise UnsupportedArchitectureError(
                f"config.json: {key} of a {self.model_type} model is {value!r:.60}, expected a positive whole number"
                + (f" up to {LARGEST_SIZE}" if isinstance(value, int) and value > LARGEST_SIZE else "")
            )
        return value

    def layer_texts(self, config: dict[str, Any]) -> dict[int, str]:  # noqa: ARG002  for families that need it
        """What stands for ``{layer}``, by layer index; empty where it is the index itself."""
        return {}

    def num_layers(self, config: dict[str, Any]) -> int | None:
        """Decoder layers of the model proper; layers beyond (multi-token prediction) are left alone.

        Raises:
            UnsupportedArchitectureError: not a positive whole number.
        """
        count = config.get("num_hidden_layers")
        return None if count is None else self.whole_number("num_hidden_layers", count)

    def expert_names(self, config: dict[str, Any]) -> ExpertNames:
        """The names that a ResMoE checkpoint of this model uses."""
        return ExpertNames(expert=self.expert, projections=dict(self.projections), layers=self.layer_texts(config))

    def absent(self, names: Iterable[str], config: dict[str, Any], moe_layers: Collection[int]) -> list[str]:
        """What the decoder's own names say is missing: whole layers, and tensors that other MoE layers have.

        Args:
            names: of all tensors.
            config: config.json.
            moe_layers: layers with experts; what is under their experts is not looked at.
        Returns:
            names, or ``layer N``, sorted; empty for families whose layers are not simply numbered.
        """
        count = self.num_layers(config)
        if self.layer_texts(config) or not isinstance(count, int):
            return []
        before = self.expert.partition("{layer}")[0]
        stems = [self.expert] if self.fused is None else [self.expert, f"{self.fused.experts}."]
        experts = tuple(stem.partition("{layer}")[2].partition("{expert}")[0] for stem in stems)
        found: dict[int, set[str]] = {}
        for name in names:
            if match := re.match(re.escape(before) + r"(\d+)(\..*)", name):
                own = found.setdefault(int(match[1]), set())
                if not match[2].startswith(experts):
                    own.add(match[2])
        usual = set().union(*(found.get(layer, ()) for layer in moe_layers))
        lacking = [f"{before}{layer}{rest}" for layer in moe_layers for rest in usual - found.get(layer, set())]
        return [f"layer {layer}" for layer in range(count) if layer not in found] + sorted(lacking)

    def find_layers(self, template: str, names: Iterable[str], config: dict[str, Any]) -> list[int]:
        """Layer indices of the tensors whose names begin with ``template``, ascending.

        Args:
            template: with ``{layer}``, perhaps with ``{expert}``.
            names: tensor names.
            config: config.json.
        """
        texts = self.layer_texts(config)
        by_text = {text: index for index, text in texts.items()}
        layer = "|".join(re.escape(text) for text in by_text) if texts else r"\d+"
        pattern = re.escape(template).replace(r"\{layer\}", f"({layer})").replace(r"\{expert\}", r"\d+")
        found = {match.group(1) for match in (re.match(pattern + r"(?:\.|$)", name) for name in names) if match}
        last = self.num_layers(config)
        indices = (by_text[text] if texts else int(text) for text in found)
        return sorted(index for index in indices if texts or last is None or index < last)
