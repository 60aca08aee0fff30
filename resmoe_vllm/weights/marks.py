"""Parameters that a checkpoint does not fill, found by what is left of them after loading.

Looked at are those that no method of this project answers for: norms, routers, most embeddings, convolutions. For
layers with a method of its own, see plain_layers.py, coded_rest.py and layer_loader.py.
"""

import os

import torch
from torch import Tensor, nn

from compress_tools.format.finite import ALLOW_VARIABLE
from resmoe_vllm.compat import UnquantizedEmbeddingMethod, UnquantizedLinearMethod


class Marks:
    """NaN at the first and last place of a model's parameters, which whoever loads one writes over.

    Args:
        model: is not loaded yet.
        is_draft: its embeddings need not be stored, vLLM puts the model's in their place.
    """

    def __init__(self, model: nn.Module, *, is_draft: bool) -> None:
        self._marked: dict[str, Tensor] = {}
        if os.environ.get(ALLOW_VARIABLE) == "1":
            return  # a checkpoint may hold NaN at these places
        seen = set[int]()
        for name, module in model.named_modules():
            method = type(getattr(module, "quant_method", None))
            if method not in (type(None), UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
                continue
            if is_draft and method is UnquantizedEmbeddingMethod:
                continue
            for own, parameter in module.named_parameters(recurse=False):
                numbers = parameter.data
                # A lazily made parameter has no numbers yet; a tied one is another's, too.
                if numbers.is_meta or not numbers.numel() or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                if numbers.dtype in (torch.float32, torch.bfloat16, torch.float16):
                    for place in _ends(numbers):
                        numbers[place] = torch.nan
                    self._marked[f"{name}.{own}" if name else own] = parameter

    def left(self) -> list[str]:
        """Names of parameters of which a place is as it was marked."""
        return [
            name
            for name, parameter in self._marked.items()
            if any(bool(parameter.data[place].isnan()) for place in _ends(parameter.data))
        ]


def _ends(numbers: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (0,) * numbers.dim(), tuple(size - 1 for size in numbers.shape)
