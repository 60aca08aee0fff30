"""What an encoder is: it makes one part's tensors of the rows that the part stands for."""

from typing import Protocol, TypeVar

import torch
from torch import Tensor

from compress_tools.format.parts.base import Part
from compress_tools.format.parts.base import StoredTensors as StoredTensors

AnyPart = TypeVar("AnyPart", bound=Part, contravariant=True)


class Encoder(Protocol[AnyPart]):
    """Codes what one expert's earlier parts left, or a layer's center."""

    def __call__(self, rows: Tensor, part: AnyPart, dtype: torch.dtype, seed: int, /) -> StoredTensors:
        """Make the part's tensors.

        Args:
            rows: ``[I, P*H]`` fp32, the columns of the part's projections, in its order; not changed.
            part: how they are to be stored.
            dtype: dtype of stored values or factors.
            seed: seed of randomised steps.
        Returns:
            ``part.tensors`` by (projection, suffix), on the CPU.
        """
        ...
