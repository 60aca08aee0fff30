"""GPT-OSS's loader in vLLM: experts of our checkpoints under names that it takes.

It takes fused tensors, which ours are not, and one expert's, ``<layer>.mlp.experts.<expert>.<name>`` for a parameter
``<name>`` of the layer whose last part is one of its own, ``w13_weight`` among them. So each stored tensor gets a
parameter of that kind, empty and only as long as weights are loaded, whose loader knows what it stands for.
"""

import re

import torch

from compress_tools.format.schema import Projection
from resmoe_vllm.compat import RoutedExperts, WeightsMapper
from resmoe_vllm.weights.layer_loader import LayerLoader

_PLACES = "resmoe"
_LAST = "w13_weight"

STREAMED_NAMES = WeightsMapper(
    orig_to_new_regex={
        re.compile(r"(\.mlp\.experts\.\d+)\.(\w+_proj\.resmoe_\w+)$"): rf"\1.{_PLACES}.\2.{_LAST}",
        # Its own mapping of this name goes by the whole of it, which ends in weight.
        re.compile(r"\.embed_tokens\.(resmoe_row_\w+)$"): r".embedding.\1",
    }
)


def streams_experts(layer: RoutedExperts) -> bool:
    """Whether the layer's model has GPT-OSS's loader."""
    return any(cls.__name__ == "GptOssRoutedExperts" for cls in type(layer).__mro__)


def add_places(layer: torch.nn.Module, loader: LayerLoader) -> None:
    """Give every stored tensor of a layer its empty parameter.

    Args:
        layer: owner of the parameters.
        loader: what loads them.
    """
    places = torch.nn.Module()
    shards: dict[Projection, str] = {projection: shard for shard, projection in loader.projection_of_shard.items()}
    for projection, shard in shards.items():
        of_projection = torch.nn.Module()
        for suffix in sorted({suffix for group in loader.groups for p, suffix in group.stored if p == projection}):
            place = torch.nn.Module()
            param = torch.nn.Parameter(torch.empty(0), requires_grad=False)
            vars(param)["weight_loader"] = loader.loader_of(suffix, shard)
            place.register_parameter(_LAST, param)
            of_projection.add_module(suffix, place)
        places.add_module(projection, of_projection)
    layer.add_module(_PLACES, places)


def remove_places(layer: torch.nn.Module) -> None:
    """Undo ``add_places``, once weights are loaded."""
    if hasattr(layer, _PLACES):
        delattr(layer, _PLACES)
