"""Is everything there that a model needs besides its experts? Told by names alone; nothing is read.

A shard that is missing, or a tensor that a converter dropped, leaves a checkpoint that loads and answers nonsense. So
each layer must have what the other layers of its kind have, and around the layers there must be embeddings, a final
norm and, unless it is tied, an output layer.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from compress_tools.architectures.base import MoEArchitecture, config_parts
from compress_tools.errors import CheckpointError
from compress_tools.source.reader import CheckpointReader

EMBEDDING = r"(?:embed_tokens|word_embeddings|tok_embeddings|embeddings|embedding|embed|wte)\.weight"
FINAL_NORM = r"(?:norm|final_layernorm|final_norm|final_layer_norm|norm_f|ln_f|embedding_norm)\.weight"
OUTPUT_NAME = "lm_head.weight"
OUTPUT = r"(?:.*\.)?(?:lm_head|output|head|embed_out|unembed)\.weight"
# What an attention has or not by the layer's kind: keys can be values too where config.json says so, indices of one
# layer serve the next ones, and sinks may be those of sliding windows alone.
_BY_KIND = frozenset({"indexer", "compressor", "attention_sink_bias"})
_KEYS_ARE_VALUES, _VALUES = "attention_k_eq_v", "v_proj"
# Norms that stand before or behind experts, and of which some families have none where they have no experts.
_OF_EXPERTS = re.compile(r"mlp|ffn|ff_|feed_?forward|moe|expert|residual")
# Matrices of one module of which none comes without the others; the gate is left out where experts have none.
_TOGETHER = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("q_proj", "k_proj", _VALUES, "o_proj"))
_GATES = frozenset({"gate_proj", "w1"})


class _Kind(NamedTuple):
    """What makes layers alike."""

    label: tuple[str, ...]
    has_experts: bool
    modules: frozenset[str]


@dataclass(frozen=True)
class Decoder:
    """What a checkpoint says of its layers.

    Attributes:
        names: of all tensors.
        config: config.json.
        count: decoder layers.
        root: what the decoder's names begin with.
        stems: what experts' names begin with behind the root, with ``{layer}``.
        moe_layers: layers with experts.
    """

    names: Collection[str]
    config: Mapping[str, Any]
    count: int
    root: str
    stems: Collection[str]
    moe_layers: Collection[int]

    @cached_property
    def holders(self) -> set[str]:
        """Modules that hold the experts."""
        return {stem.split(".")[1] for stem in _behind_layer(self.stems)}

    @cached_property
    def by_layer(self) -> dict[int, set[str]]:
        """What stands behind the number in the names of each layer, experts left out."""
        experts = _behind_layer(self.stems)
        found: dict[int, set[str]] = {layer: set() for layer in range(self.count)}
        pattern = re.compile(re.escape(f"{self.root}layers.") + r"(\d+)(\..*)")
        for name in self.names:
            match = pattern.fullmatch(name)
            if match is not None and int(match[1]) < self.count and not match[2].startswith(experts):
                found[int(match[1])].add(match[2])
        return found

    @cached_property
    def labels(self) -> list[tuple[str, ...]]:
        """See ``layer_labels``."""
        return layer_labels(self.config, self.count)


def check_whole(
    reader: CheckpointReader,
    architecture: MoEArchitecture,
    root: str,
    stems: Collection[str],
    moe_layers: Collection[int],
    names: Collection[str] | None = None,
) -> None:
    """Refuse a checkpoint that lacks a layer, a tensor of a layer, or what stands around the layers.

    Args:
        reader: the checkpoint.
        architecture: its family.
        root: what the decoder's names begin with.
        stems: what experts' names begin with behind the root; what is under them is not looked at.
        moe_layers: layers with experts.
        names: of its tensors, where they are not those that are stored.
    Raises:
        CheckpointError: names what is missing.
    """
    names = reader.names if names is None else names
    count = architecture.num_layers(reader.config)
    if architecture.layer_texts(reader.config) or count is None:
        return
    decoder = Decoder(names, reader.config, count, root, stems, moe_layers)
    absent = absent_from_layers(decoder)
    if architecture.known:
        absent += absent_from_lone_layers(decoder, architecture)
        absent += absent_experts(decoder)
    absent += absent_around(names, reader.config, root, tied=architecture.tied)
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise CheckpointError(
            f"{reader.path}: incomplete: there is no {', '.join(absent[:3])}{more}; config.json counts {count} layers"
        )


def absent_from_layers(decoder: Decoder) -> list[str]:
    """Whole layers that are missing, and tensors that other layers of the same kind have.

    Layers are of one kind where config.json's lists by layer say the same of them (attention, linear attention,
    convolution, with or without an indexer), they have the same modules, and both have experts or both have none. The
    module that holds the experts is looked at by itself. A layer that has but a part of
    another kind's modules has lost the others. A layer that is the only one of its kind is compared with none.

    Returns:
        names, or ``layer N``.
    """
    found, labels, holders = decoder.by_layer, decoder.labels, decoder.holders
    missing = [f"layer {layer}" for layer, own in found.items() if not own and layer not in decoder.moe_layers]
    for holds in (False, True):
        kinds: dict[_Kind, dict[int, set[str]]] = defaultdict(dict)
        for layer, own in found.items():
            part = {rest for rest in own if (rest.split(".")[1] in holders) is holds}
            modules = frozenset(rest.split(".")[1 + holds] for rest in part)
            if own:
                kinds[_Kind(labels[layer], layer in decoder.moe_layers, modules)][layer] = part
        missing += _lacking(kinds, f"{decoder.root}layers.")
    return missing


def absent_from_lone_layers(decoder: Decoder, architecture: MoEArchitecture) -> list[str]:
    """Tensors that a layer which is the only one of its kind lacks: ``absent_from_layers`` compares it with none.

    Kinds differ in their modules, hardly in what a module of one name consists of: where another layer's module has all
    that the lone layer's has, and more, that is missing (a bias, where the weight is there). Of two layers that both
    have experts, or both none, the whole is looked at likewise. What kinds of attention differ in is let pass. Norms
    and other tensors of the layer itself that all other layers have are missing, and so is the last of matrices that
    come together.

    Returns:
        names.
    """
    labels = decoder.labels
    found = {layer: own for layer, own in decoder.by_layer.items() if own}
    kinds = {layer: (labels[layer], layer in decoder.moe_layers) for layer in found}
    number = Counter(kinds.values())
    modules = {layer: _modules(own) for layer, own in found.items()}
    gated = "gate_proj" in dict(architecture.projections)
    optional = _BY_KIND | (
        {_VALUES} if any(part.get(_KEYS_ARE_VALUES) for part in config_parts(decoder.config)) else set()
    )
    missing = set()
    for layer in (layer for layer, kind in kinds.items() if number[kind] == 1):
        others = [other for other in found if other != layer]
        unlike = any(kinds[layer][1] != kinds[other][1] for other in others)
        lacking = {rest for rest in set().union(*found.values()) - found[layer] if _of_any_layer(rest, unlike=unlike)}
        lacking = {rest for rest in lacking if all(rest in found[other] for other in others)}
        for module, own in modules[layer].items():
            for other in others:
                theirs = modules[other].get(module, frozenset())
                if own < theirs and (module or kinds[layer][1] == kinds[other][1]):
                    alike = labels[layer] == labels[other]
                    lacking |= {
                        rest
                        for rest in theirs - own
                        if alike or not optional & _parts(rest, module, architecture.renames)
                    }
            lacking |= {rest for rest in _last_of_set(module, own, gated=gated) if not optional & _parts(rest, module)}
        missing |= {f"{decoder.root}layers.{layer}{rest}" for rest in lacking}
    return sorted(missing)


def absent_experts(decoder: Decoder) -> list[str]:
    """Layers that have a router and no experts, or nothing at all where other layers have experts.

    A dense layer has an MLP in that place, or one of another name.

    Returns:
        ``experts of layer N``.
    """
    holders, labels, moe_layers = decoder.holders, decoder.labels, decoder.moe_layers
    # By layer: its modules, and those beside the experts.
    modules = {
        layer: (
            frozenset(rest.split(".")[1] for rest in own),
            frozenset(rest.split(".")[2] for rest in own if rest.split(".")[1] in holders),
        )
        for layer, own in decoder.by_layer.items()
        if own
    }
    with_experts = {(labels[layer], *modules[layer]) for layer in moe_layers if layer in modules}
    return [
        f"experts of layer {layer}"
        for layer, (own, beside) in modules.items()
        if layer not in moe_layers
        and any(label == labels[layer] and own <= others and beside <= more for label, others, more in with_experts)
    ]


def odd_tensors(reader: CheckpointReader, root: str, stems: Collection[str]) -> list[str]:
    """Tensors that have another number of dimensions, or another kind of values, than in most layers.

    Sizes may differ from layer to layer; these hardly can. Reads no weight.

    Args:
        reader: the checkpoint.
        root: what the decoder's names begin with.
        stems: what experts' names begin with behind the root; what is under them is not looked at.
    Returns:
        sentences.
    """
    experts, found = _behind_layer(stems), defaultdict(list)
    pattern = re.compile(re.escape(f"{root}layers.") + r"\d+(\..*)")
    for name in reader.names:
        match = pattern.fullmatch(name)
        if match is not None and not match[1].startswith(experts):
            found[match[1]].append(name)
    odd = []
    for names in found.values():
        kinds = {name: (len(reader.shape(name)), "F" in reader.dtype(name)) for name in names}
        (usual, _), *others = Counter(kinds.values()).most_common()
        words = f"{usual[0]} dimensions{' of floating-point numbers' if usual[1] else ''}"
        odd += [
            f"{name} is {reader.dtype(name)} {list(reader.shape(name))}, in other layers it has {words}"
            for name, kind in kinds.items()
            if others and kind != usual
        ]
    return odd


def _behind_layer(stems: Collection[str]) -> tuple[str, ...]:
    return tuple(stem.partition("{layer}")[2] for stem in stems)


def _of_any_layer(rest: str, *, unlike: bool) -> bool:
    """Whether it is a tensor of the layer itself, or of a norm beside its modules; one of experts may be theirs alone.

    Args:
        rest: the name behind the layer's.
        unlike: of the layers that are compared some have experts and some have none.
    """
    module, *inner = rest.removeprefix(".").split(".")
    own = not (unlike and _OF_EXPERTS.search(module))
    return own and (not inner or (inner == ["weight"] and "norm" in module))


def _parts(rest: str, module: str, renames: Iterable[tuple[str, str]] = ()) -> set[str]:
    """The parts of a name behind its module's, as the family usually calls it."""
    for pattern, replacement in renames:
        rest = re.sub(pattern, replacement, rest)
    return set(rest.removeprefix(f"{module}.").split("."))


def _last_of_set(module: str, own: Collection[str], *, gated: bool) -> list[str]:
    """What is missing of matrices that come together, where all others are there."""
    missing: list[str] = []
    for together in _TOGETHER:
        wanted = {f"{module}.{matrix}.weight" for matrix in together if gated or matrix not in _GATES}
        lacking = wanted.difference(own)
        if len(lacking) == 1 and len(wanted) > 2:  # of two, the one is no sign of the other
            missing += lacking
    return missing


def _modules(own: Collection[str]) -> dict[str, frozenset[str]]:
    """By name of a module, those that hold others and the layer itself (``""``) included, what is in it."""
    within: dict[str, set[str]] = defaultdict(set)
    for rest in own:
        path = rest.split(".")
        for depth in range(1, len(path)):
            within[".".join(path[:depth])].add(rest)
    return {module: frozenset(held) for module, held in within.items()}


def _lacking(kinds: Mapping[_Kind, Mapping[int, set[str]]], before: str) -> list[str]:
    missing = []
    for kind, layers in kinds.items():
        usual = set().union(*layers.values())
        for other, kin in kinds.items():
            if kind[:2] == other[:2] and kind.modules < other.modules:
                usual |= set().union(*kin.values())
        missing += sorted(f"{before}{layer}{rest}" for layer, own in layers.items() for rest in usual - own)
    return missing


def layer_labels(config: Mapping[str, Any], count: int) -> list[tuple[str, ...]]:
    """What config.json's lists by layer say of each layer; a string of one letter a layer counts as a list."""
    lists = [
        value
        for part in config_parts(config)
        for key, value in sorted(part.items())
        if isinstance(value, list | str) and len(value) == count and (isinstance(value, list) or "pattern" in key)
    ]
    return [tuple(str(own[layer]) for own in lists) for layer in range(count)]


def absent_around(names: Collection[str], config: Mapping[str, Any], root: str, *, tied: bool = False) -> list[str]:
    """What every decoder has before and behind its layers, and this one has not.

    Args:
        names: of all tensors.
        config: config.json; ``tie_word_embeddings`` says whether there is an output layer.
        root: what the decoder's names begin with.
        tied: what holds where config.json does not say it.
    Returns:
        descriptions of what is missing.
    """
    outside = [name.removeprefix(root) for name in names if name.startswith(root)]
    missing = []
    if not any(is_embedding(name, root) for name in names):
        missing.append(f"embedding ({root}embed_tokens.weight)")
    if not any(re.fullmatch(FINAL_NORM, name) for name in outside):
        missing.append(f"final norm ({root}norm.weight)")
    if not is_tied(config, tied=tied) and not has_output(names):
        missing.append(f"output layer ({OUTPUT_NAME})")
    return missing


def is_embedding(name: str, root: str) -> bool:
    """Whether a tensor is the decoder's embedding."""
    return name.startswith(root) and re.fullmatch(EMBEDDING, name.removeprefix(root)) is not None


def has_output(names: Collection[str]) -> bool:
    """Whether there is an output layer of its own; a draft's is not the model's."""
    return any(re.fullmatch(OUTPUT, name) for name in names if "layers." not in name and not name.startswith("mtp."))


def is_tied(config: Mapping[str, Any], *, tied: bool) -> bool:
    """Whether the output layer is the embedding's.

    Args:
        config: config.json.
        tied: what holds where it does not say so.
    """
    said = [part["tie_word_embeddings"] for part in config_parts(config) if "tie_word_embeddings" in part]
    return bool(said[0] if said else tied)
