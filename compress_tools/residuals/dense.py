"""Rows as they are, in the checkpoint's dtype."""

import torch
from torch import Tensor

from compress_tools.format.parts.base import StoredTensors
from compress_tools.format.parts.dense import CENTER, DenseCenter
from compress_tools.importance import Importance
from compress_tools.source.design_matrix import design_to_rows


def store_dense(
    rows: Tensor, part: DenseCenter, dtype: torch.dtype, _seed: int, _importance: Importance | None = None
) -> StoredTensors:
    """See ``Encoder``."""
    return {
        (projection, CENTER): own.to(dtype).contiguous().cpu()
        for projection, own in design_to_rows(rows, part.projections).items()
    }
