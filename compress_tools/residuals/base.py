"""What a coder consists of: a recipe, from the user's options to parts, and an encoder, from rows to tensors."""

from typing import Protocol, TypeVar

import torch
from torch import Tensor

from compress_tools.config import CompressionConfig
from compress_tools.format.parts.base import StoredTensors
from compress_tools.format.schema import Part, Projection, ResidualPart
from compress_tools.importance import Importance

AnyPart = TypeVar("AnyPart", bound=Part, contravariant=True)


class Encoder(Protocol[AnyPart]):
    """Codes what one expert's earlier parts left, or a layer's center."""

    def __call__(
        self, rows: Tensor, part: AnyPart, dtype: torch.dtype, seed: int, importance: Importance | None = None, /
    ) -> StoredTensors:
        """Make the part's tensors.

        Args:
            rows: ``[I, P*H]`` fp32, the columns of the part's projections, in its order; not changed.
            part: how they are to be stored.
            dtype: dtype of stored values or factors.
            seed: seed of randomised steps.
            importance: what errors count, in the order of the rows; None where all count alike.
        Returns:
            ``part.tensors`` by (projection, suffix), on the CPU.
        """
        ...


class Recipe(Protocol):
    """What a ``--method`` makes of the user's options."""

    def __call__(
        self, config: CompressionConfig, projections: tuple[Projection, ...], rows: int, columns: int, /
    ) -> tuple[ResidualPart, ...]:
        """Parts that cover the projections.

        Args:
            config: the options; only the method's own count.
            projections: to be covered.
            rows: I.
            columns: of one projection, H.
        Raises:
            ConfigError: the options keep nothing of matrices this small.
        """
        ...
