"""Layers that are not compressed: vLLM's own methods, and an error where the checkpoint had no weight for one.

vLLM checks that only for models without a quantization config. A weight is NaN until it is loaded, so what is NaN
afterwards was not in the checkpoint. Seen are the layers that a model makes with its quantization config: attention,
dense and shared experts, the output layer. For what a model makes without, see weights/marks.py.
"""

from typing import TYPE_CHECKING, Any

import torch

from compress_tools.errors import CheckpointError
from resmoe_vllm.compat import UnquantizedEmbeddingMethod, UnquantizedLinearMethod

if TYPE_CHECKING:

    class _Method:
        """What the classes that this is mixed into have."""

        def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None: ...

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None: ...
else:
    _Method = object


class _Checked(_Method):
    """Over one of vLLM's methods whose layers have one ``weight``.

    Args:
        prefix: the layer's name in the model, for errors.
    """

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """See vLLM's; the weight is NaN."""
        super().create_weights(layer, *args, **kwargs)
        weight = layer.get_parameter("weight")
        if not weight.is_meta:
            weight.data.fill_(float("nan"))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """See vLLM's.

        Raises:
            CheckpointError: the weight was not loaded.
        """
        weight = layer.get_parameter("weight")
        # The largest is NaN where any is, and takes no memory.
        if weight.numel() and weight.data.amax().isnan():
            raise CheckpointError(f"{self._prefix}: not all of its weight is in the checkpoint, or it holds NaN")
        super().process_weights_after_loading(layer)


class PlainLinearMethod(_Checked, UnquantizedLinearMethod):
    """A linear layer."""


class PlainEmbeddingMethod(_Checked, UnquantizedEmbeddingMethod):
    """The embedding of tokens, or the vocabulary's output layer."""
