"""Experts as design matrices: ``[gate | up | down^T]``, ``[I, P*H]``. Sole owner of the column order."""

from collections.abc import Mapping

import torch
from torch import Tensor

from compress_tools.architectures.experts import ExpertWeights
from compress_tools.format.parts.base import Projection, Rows


def expert_to_rows(weights: ExpertWeights) -> Rows:
    """Expert matrices in design-matrix orientation: ``[I, H]`` each, ``down_proj`` transposed; views."""
    rows: Rows = {"up_proj": weights.up, "down_proj": weights.down.T}
    return {"gate_proj": weights.gate, **rows} if weights.gate is not None else rows


def rows_to_expert(rows: Rows, biases: Mapping[Projection, Tensor] | None = None) -> ExpertWeights:
    """Inverse of ``expert_to_rows``; biases are no part of the design matrix and are passed along."""
    return ExpertWeights(rows.get("gate_proj"), rows["up_proj"], rows["down_proj"].T.contiguous(), biases or {})


def rows_to_design(rows: Rows) -> Tensor:
    """Concatenate the projections' rows: ``[I, P*H]``, fp32."""
    return torch.cat([rows[projection].float() for projection in rows], dim=1)


def fill_design(design: Tensor, rows: Rows) -> None:
    """Write the projections' rows into ``design`` ``[I, P*H]``, in its dtype."""
    for part, projection in zip(design.chunk(len(rows), dim=1), rows, strict=True):
        part.copy_(rows[projection])


def design_to_rows(design: Tensor, projections: tuple[Projection, ...]) -> Rows:
    """Split ``[..., P*H]`` into ``[..., H]`` for each projection; views."""
    return dict(zip(projections, design.chunk(len(projections), dim=-1), strict=True))
