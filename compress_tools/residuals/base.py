"""What a residual coder is."""

from typing import Protocol

import torch
from torch import Tensor

from compress_tools.format.schema import Projection, ResidualPart

StoredTensors = dict[tuple[Projection, str], Tensor]


class ResidualCoder(Protocol):
    """Stores one part of a residual in fewer bytes."""

    method: str

    def encode(self, residual: Tensor, part: ResidualPart, dtype: torch.dtype, seed: int) -> StoredTensors:
        """Code what one expert's earlier parts left.

        Args:
            residual: ``[I, P*H]`` fp32, the columns of the part's projections, in its order.
            part: how; its ``method`` is the coder's.
            dtype: dtype of stored values or factors.
            seed: seed of randomised steps.
        Returns:
            stored tensors by (projection, suffix), on the CPU.
        """
        ...
