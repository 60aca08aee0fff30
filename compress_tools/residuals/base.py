"""What a residual method is, and the table of them."""

from typing import Protocol

import torch
from torch import Tensor

from compress_tools.format.schema import Projection, ResidualPart

StoredTensors = dict[tuple[Projection, str], Tensor]


class ResidualMethod(Protocol):
    """A way to store a residual in fewer bytes."""

    name: str

    def spec(
        self, projections: tuple[Projection, ...], num_rows: int, num_columns: int, retain_ratio: float
    ) -> ResidualPart:
        """The part that a budget buys.

        Args:
            projections: the group that is coded together.
            num_rows: I.
            num_columns: columns of the whole group, ``len(projections) * H``.
            retain_ratio: share of the parameters kept, in (0, 1].
        """
        ...

    def encode(self, residual: Tensor, part: ResidualPart, dtype: torch.dtype, seed: int) -> StoredTensors:
        """Code one expert's residual.

        Args:
            residual: ``[I, P*H]`` fp32, columns in design-matrix order.
            part: from ``spec``.
            dtype: dtype of stored values or factors.
            seed: seed of randomised steps.
        Returns:
            stored tensors by (projection, suffix), on the CPU.
        """
        ...
