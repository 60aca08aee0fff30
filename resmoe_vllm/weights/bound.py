"""The struct of tensors that a kernel gets beside x and topk: one layer, or one group of its experts, on one rank.

E is the number of experts in the tensors, I the rows of this rank. Codes stay codes: a kernel decodes what it needs,
when it needs it.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compress_tools.format.quantization import decode_levels, dequantize, expand_scales
from compress_tools.format.schema import Projection
from compress_tools.format.trellis import decode_trellis


@dataclass(frozen=True)
class Coded:
    """Rows of codes with scales; stands where a matrix could.

    Attributes:
        codes: uint8 ``[..., rows, code_row_bytes(bits, columns)]``.
        scales: bfloat16 ``[..., rows, groups]``.
        bits: of a code.
        columns: of a row.
        group_size: columns that share a scale; None for the whole row.
        trellis: codes are a trellis's symbols.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    columns: int
    group_size: int | None
    trellis: bool = False

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def shape(self) -> torch.Size:
        """Of the values."""
        return torch.Size((*self.codes.shape[:-1], self.columns))

    def __getitem__(self, index: int) -> "Coded":
        """One expert's."""
        return replace(self, codes=self.codes[index], scales=self.scales[index])

    def to(self, dtype: torch.dtype) -> Tensor:
        """The values ``[..., rows, columns]``, a fresh tensor."""
        decode = decode_trellis if self.trellis else dequantize
        return decode(self.codes, self.scales, self.bits, self.columns, self.group_size).to(dtype)


Matrix = Tensor | Coded


@dataclass(frozen=True)
class LowRankWeights:
    """``U @ V`` residuals of one group.

    Attributes:
        projections: the group.
        u: ``[E, I, R]``.
        v: ``[E, R, H]`` for each projection.
    """

    projections: tuple[Projection, ...]
    u: Matrix
    v: dict[Projection, Matrix]

    @property
    def rank(self) -> int:
        """R."""
        return self.u.shape[-1]

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.u)


@dataclass(frozen=True)
class QuantizedWeights:
    """Residuals of few bits.

    Attributes:
        projections: the group.
        rows: ``[E, I, H]`` for each projection.
    """

    projections: tuple[Projection, ...]
    rows: dict[Projection, Coded]

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.rows[self.projections[0]])


@dataclass(frozen=True)
class BitmapWeights:
    """Pruned residuals of one group.

    Attributes:
        projections: the group.
        mask: uint8 ``[E, I, mask_row_bytes(H)]`` for each projection.
        row_ptr: int32 ``[E, I]`` for each projection: position of a row's first value among the expert's.
        values: ``[E, values_per_expert]``, or packed ``[N]`` when ``starts`` is given; with ``value_bits`` uint8 codes,
            ``[E, bytes]`` or packed ``[bytes]``.
        starts: int64 ``[E]``, first value, or byte of codes, of each expert in packed values; else None.
        value_bits: 4 or 8; None where values are not codes.
        scales: with ``value_bits``, bfloat16 ``[E, I, groups]`` for each projection.
        group_size: columns of the matrix that share a scale; None for the whole row.
    """

    projections: tuple[Projection, ...]
    mask: dict[Projection, Tensor]
    row_ptr: dict[Projection, Tensor]
    values: Tensor
    starts: Tensor | None
    value_bits: int | None = None
    scales: dict[Projection, Tensor] | None = None
    group_size: int | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.mask[self.projections[0]])

    def expert_values(self, expert: int) -> Tensor:
        """Values of one expert in the order of ``projections``, or levels, fp32, to be scaled by ``expert_scales``.

        Other experts' values may follow.
        """
        if self.starts is None:
            own = self.values[expert]
        else:
            end = int(self.starts[expert + 1]) if expert + 1 < len(self.starts) else None
            own = self.values[int(self.starts[expert]) : end]
        if self.value_bits is None:
            return own
        return decode_levels(own, self.value_bits, own.numel() * 8 // self.value_bits)


@dataclass(frozen=True)
class RowBitmapWeights:
    """Pruned residuals of one group with equally many values in every row.

    Attributes:
        projections: the group.
        mask: uint8 ``[E, I, mask_row_bytes(H)]`` for each projection.
        values: ``[E, I, N]`` for each projection; with ``value_bits`` uint8 codes ``[E, I, code_row_bytes]``.
        values_per_row: N.
        value_bits: 4 or 8; None where values are not codes.
        scales: with ``value_bits``, bfloat16 ``[E, I, groups]`` for each projection.
        group_size: columns of the matrix that share a scale; None for the whole row.
    """

    projections: tuple[Projection, ...]
    mask: dict[Projection, Tensor]
    values: dict[Projection, Tensor]
    values_per_row: int
    value_bits: int | None = None
    scales: dict[Projection, Tensor] | None = None
    group_size: int | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.mask[self.projections[0]])

    def expert_values(self, projection: Projection, expert: int) -> Tensor:
        """Values ``[I, N]`` of one expert, or levels, fp32, to be scaled by ``expert_scales``."""
        own = self.values[projection][expert]
        return own if self.value_bits is None else decode_levels(own, self.value_bits, self.values_per_row)


def expert_scales(
    part: BitmapWeights | RowBitmapWeights, projection: Projection, expert: int, hidden_size: int
) -> Tensor:
    """A factor for each column of a bitmap with ``value_bits``: fp32 ``[I, H]``, or ``[I, 1]`` for whole rows."""
    if part.scales is None:
        raise ValueError("values that are not codes have no scales")
    return expand_scales(part.scales[projection][expert], hidden_size, part.group_size)


ResidualWeights = LowRankWeights | QuantizedWeights | BitmapWeights | RowBitmapWeights


@dataclass(frozen=True)
class ResMoEWeights:
    """One layer, or one group of its experts, on one rank.

    Attributes:
        hidden_size: H.
        intermediate_size: I on this rank.
        center: ``[I, H]`` for each projection that has a center; ``down_proj`` transposed, as everywhere.
        residual: parts, to be added up.
        coders: what a kernel reads, by the names of the format's parts (``kernel_coder``).
        biases: ``[E, I]`` of gate and up, ``[E, H]`` of down, which the first rank of those that share an expert
            holds and the others have as zeros; empty without biases.
    """

    hidden_size: int
    intermediate_size: int
    center: dict[Projection, Matrix]
    residual: tuple[ResidualWeights, ...]
    coders: frozenset[str]
    biases: dict[Projection, Tensor] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        """E; 0 where there is no residual, hence no expert."""
        return self.residual[0].num_experts if self.residual else 0
