"""Embeddings and output layers that models make without a quantisation: here they ask the model's config for one.

Most families in vLLM make the embedding of tokens so, some the output layer too. vLLM lets a plugin put a class in
place of these two; what is made is vLLM's own class again, with ResMoE's method where the model is a ResMoE checkpoint
with a rest in codes.
"""

import inspect
from typing import Any

from resmoe_vllm.compat import (
    ParallelLMHead,
    QuantizationConfig,
    VocabParallelEmbedding,
    current_quant_config,
    layer_is_replaced,
)


def ask_the_config(kind: type[QuantizationConfig]) -> None:
    """Let embeddings and output layers of models whose config is of a kind have its methods. Repeatable.

    Args:
        kind: the config's class; has ``fmt``.
    """
    for original in (VocabParallelEmbedding, ParallelLMHead):
        if not layer_is_replaced(original.__name__):
            original.register_oot(_asking(original, kind), name=original.__name__)


def _asking(original: type[Any], kind: type[QuantizationConfig]) -> type[Any]:
    signature = inspect.signature(original.__init__)

    class Asking(original):
        """Makes one of vLLM's."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = signature.bind(self, *args, **kwargs)
            config = current_quant_config()
            if (
                isinstance(config, kind)
                and config.fmt.rest is not None
                and given.arguments.get("quant_config") is None
                and given.arguments.get("quant_method") is None
            ):
                given.arguments["quant_config"] = config
            original.__init__(*given.args, **given.kwargs)
            # LoRA and others tell layers by their exact class.
            self.__class__ = original

    return Asking
