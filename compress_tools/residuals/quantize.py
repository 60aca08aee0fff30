"""Every weight as a code of 2, 3, 4 or 8 bits: residuals, and centers by the same quantiser."""

import torch
from torch import Tensor

from compress_tools.format.packing import pack_codes
from compress_tools.format.schema import QuantizedResidual
from compress_tools.format.tensors import CODES, SCALES
from compress_tools.residuals.base import StoredTensors
from compress_tools.residuals.quantizer import quantize_rows
from compress_tools.source.design_matrix import design_to_rows


def pack_rows(matrix: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    """``quantize_rows``, packed and on the CPU: uint8 ``[I, code_row_bytes]``, bfloat16 ``[I, groups]``."""
    codes, scales = quantize_rows(matrix, bits, group_size)
    return pack_codes(codes, bits).cpu(), scales.cpu()


class Quantize:
    """Part ``quantized``."""

    method = "quantized"

    def encode(self, residual: Tensor, part: QuantizedResidual, dtype: torch.dtype, seed: int) -> StoredTensors:
        """See ``ResidualCoder.encode``."""
        stored: StoredTensors = {}
        for projection, rows in design_to_rows(residual, part.projections).items():
            stored[projection, CODES], stored[projection, SCALES] = pack_rows(rows, part.bits, part.group_size)
        return stored
