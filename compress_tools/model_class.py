"""transformers' own class of a checkpoint's model, without weights: which tensors it has, and of what shapes."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from compress_tools.format.loading_guard import GUARD_KEY

if TYPE_CHECKING:
    from transformers import PreTrainedModel

META = torch.device("meta")
# Several times as many as the largest models have, whose experts are one module in a layer: seconds of building.
_MOST_MODULES = 100_000


@dataclass(frozen=True)
class Filled:
    """What becomes of a checkpoint's tensors where transformers loads them.

    Attributes:
        wrong: by the model's name of a tensor the shape that it is given and the one that it has.
        missing: the model's tensors that no tensor of the checkpoint fills.
        errors: of tensors that are put together of several, why they can't be.
    """

    wrong: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    missing: frozenset[str] = frozenset()
    errors: dict[str, str] = field(default_factory=dict)


def empty_model(config: Mapping[str, Any]) -> "PreTrainedModel | None":
    """The model that config.json describes, all of it on the meta device; runs no code of the checkpoint.

    Args:
        config: config.json, whose sizes have been bounded by what is stored.
    Returns:
        None where transformers is not installed, has no class for it, or does not make one of this config.
    """
    try:
        import transformers
        from transformers.models.auto import modeling_auto
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        return None
    try:
        kept = {key: _number(value) for key, value in config.items() if key not in ("quantization_config", GUARD_KEY)}
        with quietly():
            own = CONFIG_MAPPING[config.get("model_type")].from_dict(kept)
        named = next(iter(config.get("architectures") or ()), None)
        known = getattr(transformers, named, None) if isinstance(named, str) else None
        if not (isinstance(known, type) and getattr(known, "config_class", None) is type(own)):
            mappings = (
                modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
                modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
                modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
            )
            known = next((mapping[type(own)] for mapping in mappings if type(own) in mapping), None)
        if known is None:
            return None
        with META, quietly(), _at_most(_MOST_MODULES):
            model: PreTrainedModel = known(own)
    except Exception as err:
        # A class may raise anything of a config that is not its own. Then names, and layers beside each other, tell.
        logging.getLogger(__name__).debug("no class of transformers: %r", err)
        return None
    return model


def _number(value: Any) -> Any:
    """A value of config.json; transformers writes an Inf, which JSON has not, as an object."""
    if isinstance(value, dict):
        spelled = value.get("__float__")
        if len(value) == 1 and isinstance(spelled, str):
            return float(spelled)
        return {key: _number(one) for key, one in value.items()}
    return [_number(one) for one in value] if isinstance(value, list) else value


def fill(model: "PreTrainedModel", shapes: Mapping[str, tuple[int, ...]]) -> Filled | None:
    """Load tensors that are nothing but their shapes, as transformers loads a checkpoint.

    Args:
        model: of ``empty_model``; its tensors are replaced.
        shapes: of the checkpoint's tensors by name.
    Returns:
        None where this transformers does not load in the way that is known here.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        dtype = next(model.parameters()).dtype
        config = LoadStateDictConfig(
            dtype=dtype, device_map={"": META}, weight_mapping=get_model_conversion_mapping(model)
        )
        tensors = {name: torch.empty(shape, dtype=dtype, device=META) for name, shape in shapes.items()}
        with quietly():
            found, _ = convert_and_load_state_dict_in_model(model, tensors, config)
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, KeyError) as err:
        logging.getLogger(__name__).debug("not loaded: %r", err)
        return None
    return Filled(
        {name: (tuple(given), tuple(has)) for name, given, has in found.mismatched_keys},
        frozenset(found.missing_keys) - set(model.all_tied_weights_keys),
        {str(name): str(why) for name, why in found.conversion_errors.items()},
    )


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Nobody waits for a model of a damaged number of layers: an error where more modules are made."""
    left = count

    def look(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"more than {count} modules")

    handle = register_module_module_registration_hook(look)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' own progress bar and warnings."""
    from transformers.utils import logging as theirs

    shown, level = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if shown:
            theirs.enable_progress_bar()
