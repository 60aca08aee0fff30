"""What the tool must know of a model family: where its experts are and how they are laid out on disk."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from compress_tools.architectures.experts import GATED, MoESizes
from compress_tools.architectures.layouts import ExpertLayout, OneByOne, Stacked
from compress_tools.errors import UnsupportedArchitectureError
from compress_tools.format.schema import ExpertNames, Projection

# What decoders' names begin with: text models, then the language part of multimodal ones.
ROOTS = (
    "model.",
    "model.language_model.",
    "language_model.model.",
    "thinker.model.",
    "backbone.",
    "language_model.backbone.",
    "model.llm.",
    "language_model.",
    "",
)
# Under it families keep multi-token-prediction layers that they don't count on with the decoder's.
DRAFT = "mtp."
# Far beyond any model; counting up to a damaged config's number must not take for ever.
LARGEST_SIZE = 2**20
# Where config.json keeps the language part of a multimodal model.
NESTED = ("text_config", "thinker_config", "llm_config", "language_config")


@dataclass(frozen=True)
class MoEArchitecture:
    """One model family. What differs between families is data; docs/adding-a-family.md has a worked example.

    Attributes:
        model_type: ``model_type`` of config.json.
        title: the family's name for people.
        aliases: further values of ``model_type``, the language part's own among them.
        models: published models that it stands for, each with the precisions it is published in: ``X (bf16, fp8)``.
        expert: name that a ResMoE checkpoint gives an expert, behind the root, with ``{layer}`` and ``{expert}``: one
            that vLLM's loader of the family knows.
        projections: projection -> last name component there; two-matrix experts have no ``gate_proj``.
        layouts: the ways in which its checkpoints lay experts out, the usual one first: restored checkpoints have it.
        num_experts_keys: config.json's keys of E, the first that has a value counts (transformers has renamed some).
        intermediate_size_keys: likewise of I.
        hidden_size_keys: likewise of H.
        num_layers_keys: likewise of the number of decoder layers.
        renames: (pattern, replacement) for other tensors of a stacked checkpoint, to the family's usual names.
        tied: the output layer is the embedding's unless config.json says otherwise.
        own_output: vLLM's class has an output layer of its own even where it is tied: a tied one is written out.
        exact_rest: modules whose matrices are not stored in codes by row (``--rest-bits 8``), by the last part of their
            names: vLLM's loader of the family changes their values or names, and knows only weights.
        vllm: the family serves in vLLM; otherwise ``runs_in`` says where and why.
        vllm_cpu: vLLM's CPU build serves it; otherwise ``runs_in`` says why not.
        runs_in: a sentence for families that vLLM, or its CPU build, can't serve.
        known: a row of the registry; otherwise made up from a checkpoint's names, and untested.
    """

    model_type: str
    title: str
    aliases: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    expert: str = "layers.{layer}.mlp.experts.{expert}"
    projections: tuple[tuple[Projection, str], ...] = tuple(GATED.items())
    layouts: tuple[ExpertLayout, ...] = (OneByOne(), Stacked())
    num_experts_keys: tuple[str, ...] = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    intermediate_size_keys: tuple[str, ...] = ("moe_intermediate_size", "intermediate_size")
    hidden_size_keys: tuple[str, ...] = ("hidden_size",)
    num_layers_keys: tuple[str, ...] = ("num_hidden_layers", "num_layers")
    renames: tuple[tuple[str, str], ...] = ()
    tied: bool = False
    own_output: bool = False
    exact_rest: tuple[str, ...] = ()
    vllm: bool = True
    vllm_cpu: bool = True
    runs_in: str = ""
    known: bool = True

    @property
    def model_types(self) -> tuple[str, ...]:
        """Every ``model_type`` that is this family."""
        return (self.model_type, *self.aliases)

    @property
    def served_here(self) -> bool:
        """VLLM's CPU build, which the tests have, serves the family."""
        return self.vllm and self.vllm_cpu

    @property
    def biased(self) -> bool:
        """Experts have biases."""
        return any(isinstance(layout, Stacked) and layout.bias for layout in self.layouts)

    def decoder_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of config.json that describes the decoder: the first that counts experts, else the whole."""
        return next((part for part in config_parts(config) if _first(part, self.num_experts_keys) is not None), config)

    def sizes(self, config: Mapping[str, Any]) -> MoESizes:
        """Read E, H and I from config.json.

        Raises:
            UnsupportedArchitectureError: a key is missing or not a positive whole number.
        """
        own = self.decoder_config(config)
        values = []
        for keys in (self.num_experts_keys, self.hidden_size_keys, self.intermediate_size_keys):
            key = next((key for key in keys if own.get(key) is not None), " or ".join(keys))
            value = own.get(key)
            if isinstance(value, list) and value and value == value[:1] * (self.num_layers(config) or 0):
                # One for each layer, and all alike.
                value = value[0]
            values.append(self.whole_number(key, value))
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

    def layer_texts(self, config: Mapping[str, Any]) -> dict[int, str]:  # noqa: ARG002  for families that need it
        """What stands for ``{layer}``, by layer index; empty where it is the index itself."""
        return {}

    def num_layers(self, config: Mapping[str, Any]) -> int | None:
        """Decoder layers of the model proper, without those beyond (multi-token prediction).

        Raises:
            UnsupportedArchitectureError: not a positive whole number.
        """
        own = self.decoder_config(config)
        key = next((key for key in self.num_layers_keys if own.get(key) is not None), None)
        return None if key is None else self.whole_number(key, own[key])

    def expert_names(self, config: Mapping[str, Any], root: str) -> ExpertNames:
        """The names that a ResMoE checkpoint of this model uses.

        Args:
            config: config.json.
            root: what the decoder's names begin with.
        """
        texts = self.layer_texts(config)
        return ExpertNames(expert=root + self.expert, projections=dict(self.projections), layers=texts)

    def locate(self, names: Collection[str], config: Mapping[str, Any]) -> Iterator["Located"]:
        """Find the experts by their names.

        Args:
            names: of all tensors.
            config: config.json.
        Yields:
            root, layout and layers, wherever the names fit, the likeliest first; shapes decide between layouts of the
            same names. A family's own layouts come before those of others, which converters sometimes use.
        """
        texts = self.layer_texts(config)
        by_text = {text: index for index, text in texts.items()}
        layer = "|".join(map(re.escape, by_text)) if texts else r"\d+"
        last = self.num_layers(config)
        for layout in (*self.layouts, *self._foreign_layouts()):
            for root in ROOTS:
                pattern = re.compile(re.escape(root) + layout.pattern().replace("{layer}", layer))
                found = {match["layer"] for name in names if (match := pattern.fullmatch(name))}
                indices = sorted(by_text[text] if texts else int(text) for text in found)
                own = tuple(index for index in indices if texts or last is None or index < last)
                if own:
                    yield Located(root, layout, own)

    def locate_drafts(
        self, names: Collection[str], config: Mapping[str, Any], located: "Located"
    ) -> dict[int, list["DraftLayer"]]:
        """Find the experts of multi-token-prediction layers: behind the decoder's layers, or under ``mtp.``.

        Args:
            names: of all tensors.
            config: config.json.
            located: where the decoder has its experts.
        Returns:
            what the names fit, by layer index, the likeliest first; shapes decide.
        """
        last = self.num_layers(config)
        if last is None or self.layer_texts(config):
            return {}
        number = re.compile(re.escape(f"{located.root}layers.") + r"(\d+)\.")
        outside = [
            name
            for name in names
            if DRAFT in name or ((match := number.match(name)) is not None and int(match[1]) >= last)
        ]
        found: dict[int, list[DraftLayer]] = {}
        if not outside:
            return found
        for layout in (located.layout, *self.layouts, *self._foreign_layouts()):
            root = rf"(?P<root>{re.escape(located.root)}|(?:.*\.)?{re.escape(DRAFT)})"
            pattern = re.compile(root + layout.pattern().replace("{layer}", r"\d+"))
            places = {match.group("root", "layer") for name in outside if (match := pattern.fullmatch(name))}
            for before, text in sorted(places):
                # `mtp.layers.0` counts from the decoder's end, `model.layers.46` counts on with it.
                index = int(text) + (last if before.endswith(DRAFT) else 0)
                expert = before + self.expert.replace("{layer}", text)
                own = DraftLayer(layout, before + layout.stem.replace("{layer}", text), expert)
                found.setdefault(index, []).append(own)
        return dict(sorted(found.items()))

    def _foreign_layouts(self) -> tuple[ExpertLayout, ...]:
        """Layouts of other families with the same number of matrices; a row that is made up has its own alone."""
        if not self.known:
            return ()
        gated = "gate_proj" in dict(self.projections)
        return tuple(layout for layout in KNOWN_LAYOUTS if is_gated(layout) is gated and layout not in self.layouts)


@dataclass(frozen=True)
class Located:
    """Where a checkpoint has its experts.

    Attributes:
        root: what the decoder's names begin with.
        layout: how the experts lie.
        layers: indices of layers that hold experts, ascending.
    """

    root: str
    layout: ExpertLayout
    layers: tuple[int, ...]


@dataclass(frozen=True)
class DraftLayer:
    """The experts of a multi-token-prediction layer.

    Attributes:
        layout: how they lie, often not as the decoder's.
        stem: what their names begin with, the layer filled in.
        expert: name that a ResMoE checkpoint gives one, with ``{expert}``.
    """

    layout: ExpertLayout
    stem: str
    expert: str


def config_parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """config.json and the language parts nested in it, the outer ones first."""
    parts = [config]
    for key in NESTED:
        if isinstance(inner := config.get(key), dict):
            parts += config_parts(inner)
    return parts


def is_gated(layout: ExpertLayout) -> bool:
    """Whether a layout's experts have a gate."""
    return layout.gated if isinstance(layout, Stacked) else "gate_proj" in getattr(layout, "projections", ())


def target_names(layout: ExpertLayout) -> tuple[str, dict[Projection, str]]:
    """What a ResMoE checkpoint calls an expert and its projections where nothing says what vLLM's loader expects."""
    if isinstance(layout, OneByOne):
        return layout.expert, dict(layout.projections)
    return f"{layout.stem}{{expert}}", GATED if is_gated(layout) else dict(TWO_MATRICES)


def _first(config: Mapping[str, Any], keys: Iterable[str]) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)


MIXTRAL_PROJECTIONS: tuple[tuple[Projection, str], ...] = (
    ("gate_proj", "w1"),
    ("up_proj", "w3"),
    ("down_proj", "w2"),
)
TWO_MATRICES: tuple[tuple[Projection, str], ...] = (("up_proj", "up_proj"), ("down_proj", "down_proj"))
# Every layout that published checkpoints use, for families that are not known and files that a converter renamed.
KNOWN_LAYOUTS: tuple[ExpertLayout, ...] = (
    OneByOne(),
    Stacked(),
    *(
        OneByOne(f"layers.{{layer}}.{module}.experts.{{expert}}", names)
        for module in ("block_sparse_moe", "feed_forward", "mlp", "mixer", "ffn", "moe")
        for names in (dict(MIXTRAL_PROJECTIONS), GATED, dict(TWO_MATRICES))
        if (module, names) != ("mlp", GATED)
    ),
    *(
        Stacked(f"layers.{{layer}}{module}.experts", transposed=transposed)
        for module in ("", ".feed_forward", ".mlp")
        for transposed in (False, True)
        if (module, transposed) != (".mlp", False)
    ),
    Stacked("layers.{layer}.moe", ("gate_proj.weight", "up_proj.weight"), "down_proj.weight"),
    Stacked("layers.{layer}.block_sparse_moe", ("input_linear.weight",), "output_linear.weight"),
)
