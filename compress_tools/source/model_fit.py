"""Do a checkpoint's plain tensors fit the model that its config.json describes? Told by headers; nothing is read.

Names and shapes are compared with transformers' own class of the model, which is made without weights. Of a model that
transformers has no class for, layers of the same kind are compared with each other.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from compress_tools.architectures.base import MoEArchitecture
from compress_tools.errors import CheckpointError
from compress_tools.format.directory import check_counts
from compress_tools.format.plain_tensors import FLOATS
from compress_tools.model_class import Filled, empty_model, fill
from compress_tools.source.completeness import FINAL_NORM, OUTPUT_NAME, is_embedding, layer_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The module that holds them in transformers' classes, and what begins the name of a layer's module.
_EXPERTS, _LAYER = "experts", re.compile(r"\.\d+\.")

# `1` lets tensors pass that do not fit: a published model may have them where nothing reads them.
ALLOW_VARIABLE = "RESMOE_ALLOW_MISFIT"
_WAY_OUT = f"download it again, or set {ALLOW_VARIABLE}=1 if the model was published so"


class PlainTensor(NamedTuple):
    """A tensor that is copied as it is.

    Attributes:
        dtype: as safetensors spells it; of a matrix in codes, that of its weights.
        shape: sizes.
        place: its file and name there, for errors.
    """

    dtype: str
    shape: tuple[int, ...]
    place: str


@dataclass(frozen=True)
class PlainPart:
    """What a checkpoint is made of beside its compressed experts, told by headers.

    Attributes:
        path: names the checkpoint in errors.
        config: config.json.
        architecture: its family.
        hidden_size: of the experts.
        root: what the decoder's names begin with.
        moe_layers: layers with experts.
        tensors: by the name that a ResMoE checkpoint gives them.
    """

    path: Path
    config: Mapping[str, Any]
    architecture: MoEArchitecture
    hidden_size: int
    root: str
    moe_layers: frozenset[int]
    tensors: Mapping[str, PlainTensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def check_fit(part: PlainPart) -> None:
    """Refuse plain tensors of other shapes than the model has, and a model that is none with experts.

    Raises:
        CheckpointError: names the tensor, what it is and what it should be, or one of the decoder that is missing.
    """
    check_counts(part.config, len(part.tensors), str(part.path))
    if os.environ.get(ALLOW_VARIABLE) == "1":
        return
    model = empty_model(part.config)
    experts = [] if model is None else [f"{n}." for n, _ in model.named_modules() if n.rpartition(".")[2] == _EXPERTS]
    if model is not None and not experts and not part.architecture.known:
        raise CheckpointError(
            f"{part.path}: config.json's model_type is {part.config.get('model_type')!r:.60}, and "
            f"{type(model).__name__} has no experts; there are some in {len(part.moe_layers)} layers; {_WAY_OUT}"
        )
    filled = fill(model, part.shapes) if model is not None and experts else None
    if model is None or filled is None:
        _check_sizes(part)
        _compare_layers(part)
        return
    _check_filled(part, filled, type(model).__name__)
    _check_kinds(part, model)
    parameters = {name for name, _ in model.named_parameters()}
    decoders = tuple(_LAYER.split(name)[0].rpartition(".")[0] for name in experts)
    missing = sorted(
        name
        for name in filled.missing & parameters
        if name.startswith(decoders) and not name.startswith(tuple(experts)) and not _optional(model, name)
    )
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{part.path}: incomplete: there is no {missing[0]}{more}, as transformers calls it; "
            f"{type(model).__name__} has it by config.json; {_WAY_OUT}"
        )


def _check_filled(part: PlainPart, filled: Filled, title: str) -> None:
    for name, (found, expected) in sorted(filled.wrong.items()):
        place = part.tensors[name].place if name in part.tensors else f"{name!r}, as transformers calls it,"
        _misshapen(part, place, found, f"{list(expected)} as {title} has it by config.json")
    for name, why in sorted(filled.errors.items()):
        raise CheckpointError(
            f"{part.path}: what fills {name!r} of {title} does not fit config.json: {' '.join(why.split())[:300]}; "
            f"{_WAY_OUT}"
        )


def _optional(model: object, name: str) -> bool:
    """Whether transformers' class says that a checkpoint may lack a tensor."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _check_kinds(part: PlainPart, model: "PreTrainedModel") -> None:
    """Tables of whole numbers are where the class has them, and floating-point numbers everywhere else."""
    tables = {name for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}
    leaves = tuple({name.rpartition(".")[2] for name in tables})
    # A stored name is the class's own but for parts of it, so that each is asked for alone. They are few.
    for name, tensor in part.tensors.items():
        # fp8 is neither: no number without its scale, and no index.
        number, index = tensor.dtype in FLOATS, "F" not in tensor.dtype
        if number and not (leaves and name.endswith(leaves)):
            continue
        if (filled := fill(model, {name: tensor.shape})) is None:
            continue
        for place in sorted(set(model.state_dict()) - filled.missing):
            if not (index if place in tables else number):
                raise CheckpointError(
                    f"{part.path}: {tensor.place} is {tensor.dtype}, expected "
                    f"{'whole' if place in tables else 'floating-point'} numbers as {type(model).__name__} has in "
                    f"{place}; {_WAY_OUT}"
                )


def _check_sizes(part: PlainPart) -> None:
    """What any decoder has in the sizes that config.json says: embedding, output layer, last norm."""
    vocabulary = part.architecture.decoder_config(part.config).get("vocab_size")
    for name, (_, shape, place) in part.tensors.items():
        expected = shape
        output = name.endswith(OUTPUT_NAME) and part.root.startswith(name.removesuffix(OUTPUT_NAME))
        if is_embedding(name, part.root) or output:
            expected = (vocabulary if isinstance(vocabulary, int) else max(1, *shape[:1]), part.hidden_size)
        elif name.startswith(part.root) and re.fullmatch(FINAL_NORM, name.removeprefix(part.root)):
            expected = (part.hidden_size,)
        if shape != expected or 0 in shape:
            _misshapen(part, place, shape, str(list(expected)) if shape != expected else "no size of 0")


def _misshapen(part: PlainPart, place: str, shape: tuple[int, ...], expected: str) -> NoReturn:
    raise CheckpointError(f"{part.path}: {place} has shape {list(shape)}, expected {expected}; {_WAY_OUT}")


def _compare_layers(part: PlainPart) -> None:
    """Layers of which config.json says the same have tensors of one name in the same shape.

    Sizes may differ by a rule that only the model's code knows, but not for one layer among others of its kind, nor so
    that as many numbers, or another number of dimensions, come of it.
    """
    count = part.architecture.num_layers(part.config)
    if count is None:
        return
    labels = layer_labels(part.config, count)
    found: dict[tuple[tuple[str, ...], str], dict[int, tuple[int, ...]]] = defaultdict(dict)
    pattern = re.compile(re.escape(f"{part.root}layers.") + r"(\d+)\.(.+)")
    for name, tensor in part.tensors.items():
        if (match := pattern.fullmatch(name)) is not None and int(match[1]) < count:
            found[labels[int(match[1])], match[2]][int(match[1])] = tensor.shape
    for (_, rest), own in found.items():
        (usual, _), *others = Counter(own.values()).most_common()
        for shape, _ in others:
            layer = next(layer for layer in own if own[layer] == shape)
            kin = [own[other] for other in own if (other in part.moe_layers) is (layer in part.moe_layers)]
            alone = kin.count(usual) == len(kin) - 1 > 1
            if alone or len(shape) != len(usual) or prod(shape) == prod(usual):
                like = next(other for other in own if own[other] == usual)
                expected = f"{list(usual)} as '{part.root}layers.{like}.{rest}' of another layer has"
                _misshapen(part, part.tensors[f"{part.root}layers.{layer}.{rest}"].place, shape, expected)
