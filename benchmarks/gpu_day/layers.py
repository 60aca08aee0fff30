"""Layers of random content on a device, every coder, no two experts alike; and shapes small enough to check."""

from dataclasses import replace

import torch

from benchmarks.compiled.layers import MATRIX_METHODS
from benchmarks.harness.shapes import SHAPES, MoEShape
from benchmarks.models.synthetic_layer import synthetic_format
from resmoe_vllm.weights.layer_loader import BoundGroup, LayerLoader

# odd sizes: no row begins where a load would like it, and the last octet of columns is cut
CHECKED = MoEShape("check", hidden=204, intermediate=75, experts=9, top_k=2, layers=1)
PROFILED = SHAPES["OLMoE-1B-7B"]
REHEARSED = replace(PROFILED, hidden=256, intermediate=64, experts=8, top_k=2, layers=1)


def random_layer(shape: MoEShape, method: str, dtype: str, device: str) -> BoundGroup:
    """A layer as the plugin holds it after loading, its terms about equally large."""
    fmt = synthetic_format(shape, dtype, **MATRIX_METHODS[method])
    loader = LayerLoader(fmt, 0, lambda expert: expert)
    module = torch.nn.Module()
    loader.create_params(module, getattr(torch, dtype))
    loader.load_dummies()
    ranks = [part.rank for part in fmt.layers[0].residual if part.method == "low_rank"]
    size = shape.hidden**-0.5
    for name, param in module.named_parameters():
        suffix = name.split("_", 1)[1]
        if not param.is_floating_point():
            continue
        # what load_dummies made lies in [-1e-3, 1e-3), scales of codes in [0, 1e-3)
        wanted = size
        if "_u" in suffix or "_v_" in suffix or suffix.endswith("_v"):
            wanted = (size / ranks[0] ** 0.5) ** 0.5
        if suffix.endswith("scales"):
            wanted *= 0.03
        param.data.mul_(1e3 * wanted)
        if len(param) == shape.experts:
            param.data.mul_(1 + 0.1 * torch.arange(shape.experts, dtype=param.dtype)[:, None])
    module.to(device)
    loader.groups[0].params = {name: getattr(module, name) for name in loader.groups[0].params}
    (group,) = loader.bind(module)
    return group
