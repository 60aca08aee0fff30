"""Tensors for ``--load-format dummy``: what one expert could have stored, small and random."""

import torch
from torch import Tensor

from compress_tools.format.dtypes import DTYPES
from compress_tools.format.schema import LayerSpec, ResMoEFormat
from compress_tools.format.tensors import expert_tensors, shared_tensors
from resmoe_vllm.weights.layout import Key


def dummy_tensors(fmt: ResMoEFormat, spec: LayerSpec) -> dict[Key, Tensor]:
    """Shared tensors and those of any expert, by (projection, suffix), on the CPU.

    Args:
        fmt: the checkpoint's format block.
        spec: one group's.
    Returns:
        values in [-1e-3, 1e-3), scales in [0, 1e-3), codes anywhere, masks evenly spread.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    tensors: dict[Key, Tensor] = {}
    for tensor in (*shared_tensors(fmt, spec), *expert_tensors(fmt, spec, 0)):
        key = tensor.projection, tensor.suffix
        if tensor.dtype == "uint8":
            tensors[key] = torch.randint(256, tensor.shape, generator=generator, dtype=torch.uint8, device="cpu")
        else:
            values = torch.rand(tensor.shape, generator=generator, dtype=torch.float32, device="cpu") * 2e-3
            tensors[key] = (values / 2 if tensor.role == "scales" else values - 1e-3).to(DTYPES[tensor.dtype])
    for part in spec.residual:
        tensors |= part.example_masks(fmt.sizes)
    return tensors
