"""What a layer's stored tensors mean: parts added up, and ``restore_expert``, the one truth (SPEC.md, 4).

Rows are in design-matrix orientation: ``rows[projection]`` is ``[I, H]``, ``down_proj`` transposed. All arithmetic
is in fp32. What each part means is its own ``decode``.
"""

import torch

from compress_tools.format.parts.base import Rows, Stored
from compress_tools.format.schema import LayerSpec


def decode_residual(layer: LayerSpec, stored: Stored, hidden_size: int) -> Rows:
    """Sum of the residual's parts, fp32 ``[I, H]`` for each projection; ``layer`` as from ``LayerSpec.of_expert``."""
    if layer.groups is not None:
        raise ValueError("a layer of several groups has no one residual; pass layer.of_expert(expert)")
    total: Rows = {}
    for part in layer.residual:
        for projection, value in part.decode(stored, hidden_size).items():
            total[projection] = total[projection] + value if projection in total else value
    return total


def restore_center(layer: LayerSpec, shared: Stored, hidden_size: int, dtype: torch.dtype = torch.float32) -> Rows:
    """The center that every expert of the layer shares: ``[I, H]`` in ``dtype`` for each projection that has one."""
    rows: Rows = {}
    for part in layer.center:
        rows |= part.decode(shared, hidden_size, dtype)
    return rows


def restore_expert(layer: LayerSpec, shared: Stored, stored: Stored, hidden_size: int) -> Rows:
    """Restored expert: center + decoded residual, added in fp32, in design-matrix orientation.

    Args:
        layer: the layer's spec as this expert is stored: ``LayerSpec.of_expert``.
        shared: the layer's shared tensors by (projection, suffix).
        stored: the expert's tensors by (projection, suffix).
        hidden_size: H.
    Returns:
        fp32 ``[I, H]`` for each projection.
    Raises:
        FormatError: masks and value counts disagree.
    """
    rows = decode_residual(layer, stored, hidden_size)
    for projection, center in restore_center(layer, shared, hidden_size).items():
        rows[projection] = rows[projection] + center
    return rows
