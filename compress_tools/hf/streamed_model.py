"""transformers' own model with one decoder layer in memory at a time, read through the project's readers."""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from compress_tools.errors import CheckpointError, UnsupportedArchitectureError
from compress_tools.hf.dense_experts import experts_module
from compress_tools.model_class import META, quietly
from compress_tools.source.moe_source import MoESource
from compress_tools.text_file import in_words


class _LastLayerDoneError(Exception):
    """Ends a model's forward behind its last layer; never leaves this module."""


@dataclass(frozen=True)
class LayerCall:
    """What the model's forward calls one decoder layer with: a batch of windows ``[N, L, ...]``.

    Attributes:
        index: of the layer.
        module: the layer, its weights in memory.
        args, kwargs: as the model passes them.
    """

    index: int
    module: nn.Module
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    count: int

    def run(self, start: int, stop: int) -> Any:
        """The layer's output for windows ``start`` to ``stop``."""
        args, kwargs = self._cut(self.args, start, stop), self._cut(self.kwargs, start, stop)
        return self.forward(*args, **kwargs)

    def _cut(self, value: Any, start: int, stop: int) -> Any:
        """Tensors of all windows cut; what is the same for all of them as it is."""
        if isinstance(value, Tensor):
            return value[start:stop] if value.dim() > 1 and len(value) == self.count else value
        if isinstance(value, tuple):
            return tuple(self._cut(one, start, stop) for one in value)
        if isinstance(value, dict):
            return {key: self._cut(one, start, stop) for key, one in value.items()}
        return value


def joined(parts: list[Any]) -> Any:
    """Outputs of some windows each as those of all."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, tuple):
        return tuple(joined(list(own)) for own in zip(*parts, strict=True))
    return first


class StreamedModel:
    """A causal language model whose decoder layers are read, used and dropped one after the other.

    Embeddings, the last norm and the output layer stay in memory.

    Args:
        source: the checkpoint.
        dtype: of weights and arithmetic.
        loading: of ``from_pretrained``: ``trust_remote_code``.
    Raises:
        UnsupportedArchitectureError: transformers has no class for it, or none whose experts are a module.
        CheckpointError: its weights do not fill the class.
    """

    def __init__(self, source: MoESource, dtype: torch.dtype, **loading: bool) -> None:
        self.source, self._dtype = source, dtype
        if source.names.layers:
            raise UnsupportedArchitectureError(
                f"{source.reader.path}: {source.architecture.title} is an encoder-decoder, which does not "
                "run layer by layer"
            )
        self.model = _on_meta(source, dtype, **loading)
        first = source.located.layers[0]
        # Names of the layers' list in the model, and what names of a layer's tensors in the checkpoint begin with.
        self._list = experts_module(self.model, source.names, first).split(f".{first}.")[0]
        stem = source.located.root + source.layout.stem
        self._before = stem[: stem.index("{layer}")]
        self.layers = self.model.get_submodule(self._list)
        self._more: dict[int, int] = {}
        self._forwards = [layer.forward for layer in self.layers]
        outside = [name for name in source.reader.names if not self._is_of_layers(name)]
        source.need_copied(outside, source.layers)
        self._load(outside, self._outside())
        self.model.tie_weights()
        self.model.eval()

    def experts(self, layer: int) -> nn.Module:
        """The experts module of a layer."""
        found: nn.Module = self.model.get_submodule(experts_module(self.model, self.source.names, layer))
        return found

    @torch.no_grad()
    def run(self, tokens: Tensor, step: Callable[[LayerCall], Any]) -> Tensor:
        """Run windows through all layers.

        Args:
            tokens: ``[N, L]`` int64, N other than L, by which a batch of windows is known.
            step: makes a layer's output for all windows of its call, as the layer would.
        Returns:
            what the last layer gave, ``[N, L, H]``; ``logits`` goes on from there.
        """
        kept: list[Tensor] = []

        def behind(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                with self._in_memory(index):
                    call = LayerCall(index, self.layers[index], self._forwards[index], args, kwargs, len(tokens))
                    made = step(call)
                if isinstance(made, tuple):
                    self._more[index] = len(made) - 1
                if index == len(self._forwards) - 1:
                    kept.append(made[0] if isinstance(made, tuple) else made)
                    raise _LastLayerDoneError
                return made

            return forward

        with self._instead(behind):
            try:
                self.model(input_ids=tokens, use_cache=False)
            except _LastLayerDoneError:
                return kept[0]
        raise UnsupportedArchitectureError(f"{type(self.model).__name__}: its forward does not call its layers")

    @torch.no_grad()
    def logits(self, tokens: Tensor, last: Tensor) -> Tensor:
        """Logits ``[N, L, V]`` of windows ``[N, L]`` from what the last layer gave, ``[N, L, H]``."""

        def behind(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                passed = last if index == len(self._forwards) - 1 else args[0] if args else kwargs["hidden_states"]
                # What a layer returns beside its hidden states is for the layer behind it, which does not look at it.
                return (passed, *[None] * self._more[index]) if index in self._more else passed

            return forward

        with self._instead(behind):
            logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits

    @contextmanager
    def _instead(self, made: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        for index, layer in enumerate(self.layers):
            layer.forward = made(index)
        try:
            yield
        finally:
            for layer, forward in zip(self.layers, self._forwards, strict=True):
                layer.forward = forward

    @contextmanager
    def _in_memory(self, index: int) -> Iterator[None]:
        prefix = f"{self._before}{index}."
        names = [name for name in self.source.reader.names if name.startswith(prefix)]
        stored = {name for name in _tensors(self.model) if name.startswith(f"{self._list}.{index}.")}
        self.source.reader.need(names)
        self._load(names, stored)
        try:
            yield
        finally:
            for name in stored:
                _drop(self.model, name)

    def _is_of_layers(self, name: str) -> bool:
        return re.match(re.escape(self._before) + r"\d+\.", name) is not None

    def _outside(self) -> set[str]:
        """Names of the model's tensors outside of the layers."""
        return {name for name in _tensors(self.model) if not name.startswith(f"{self._list}.")}

    def _load(self, names: Collection[str], expected: set[str]) -> None:
        """Fill the tensors ``expected`` with these of the checkpoint."""
        reader, model = self.source.reader, self.model
        config = LoadStateDictConfig(
            dtype=self._dtype,
            dtype_plan=model._get_dtype_plan(self._dtype),
            weight_mapping=get_model_conversion_mapping(model),
        )
        with quietly():
            found, _ = convert_and_load_state_dict_in_model(model, {name: reader.get(name) for name in names}, config)
        tied = set(model.all_tied_weights_keys)
        lacking = [name for name in sorted(expected - tied) if _get(model, name).device == META]
        wrong = [str(key) for key in (*found.mismatched_keys, *found.conversion_errors.values(), *found.error_msgs)]
        if lacking or wrong:
            what = wrong[0] if wrong else f"{lacking[0]} is not in the checkpoint"
            raise CheckpointError(f"{reader.path}: its weights don't fill transformers' {type(model).__name__}: {what}")


def _on_meta(source: MoESource, dtype: torch.dtype, **loading: bool) -> PreTrainedModel:
    """The model without weights; buffers that no checkpoint holds (rotary frequencies) are computed."""
    path = source.reader.path
    try:
        config = AutoConfig.from_pretrained(path, **loading)
        # Models that see pictures, too, have no class for text alone; they need none.
        text = type(config) in AutoModelForCausalLM._model_mapping or hasattr(config, "auto_map")
        with META:
            auto = AutoModelForCausalLM if text else AutoModelForImageTextToText
            model = auto.from_config(config, dtype=dtype, **loading)
    except ValueError as err:
        words = in_words(err).replace("`trust_remote_code=True`", "--trust-remote-code")
        raise UnsupportedArchitectureError(
            f"{path}: transformers has no causal language model for it: {words}"
        ) from err
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as err:
        raise CheckpointError(f"{path}: transformers can't build it: {in_words(err)}") from err
    for module in model.modules():
        module._is_hf_initialized = False
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers[name]) is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    model.initialize_weights()
    return model


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers."""
    found: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return found


def _get(model: nn.Module, name: str) -> Tensor:
    module, _, own = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(module), own)
    return found


def _drop(model: nn.Module, name: str) -> None:
    """Drop a tensor's memory."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if own in module._parameters:
        module._parameters[own] = nn.Parameter(_get(model, name).to(META), requires_grad=False)
    else:
        module._buffers[own] = _get(model, name).to(META)
