"""Every weight as a code of 2, 3, 4 or 8 bits: residuals, and centers by the same quantiser."""

import torch
from torch import Tensor

from compress_tools.config import CompressionConfig
from compress_tools.format.packing import pack_codes
from compress_tools.format.parts.base import CodedRows, Projection, StoredTensors
from compress_tools.format.parts.quantized import QuantizedCenter, QuantizedResidual
from compress_tools.importance import Importance
from compress_tools.residuals.quantizer import quantize_rows
from compress_tools.source.design_matrix import design_to_rows


def quantized_parts(
    config: CompressionConfig, projections: tuple[Projection, ...], _rows: int, _columns: int
) -> tuple[QuantizedResidual, ...]:
    """See ``Recipe``."""
    return (QuantizedResidual(projections=projections, bits=config.plain_bits, group_size=config.group_size or None),)


def pack_rows(
    stored_as: CodedRows,
    projection: Projection,
    matrix: Tensor,
    bits: int,
    group_size: int | None = None,
    columns: Tensor | None = None,
) -> StoredTensors:
    """``quantize_rows``, packed and on the CPU, under the names that ``stored_as`` gives."""
    codes, scales = quantize_rows(matrix, bits, group_size, columns=columns)
    return {
        (projection, stored_as.codes): pack_codes(codes, bits).cpu(),
        (projection, stored_as.scales): scales.cpu(),
    }


def quantize(
    rows: Tensor,
    part: QuantizedResidual | QuantizedCenter,
    _dtype: torch.dtype,
    _seed: int,
    importance: Importance | None = None,
) -> StoredTensors:
    """See ``Encoder``."""
    stored: StoredTensors = {}
    for projection, own in design_to_rows(rows, part.projections).items():
        columns = None if importance is None else importance.columns.get(projection)
        stored |= pack_rows(part.stored_as, projection, own, part.bits, part.group_size, columns)
    return stored
