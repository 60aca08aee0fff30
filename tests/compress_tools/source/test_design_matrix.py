"""The design matrix keeps the expert: order of columns, and the freedom to permute rows."""

import torch
from torch.nn.functional import silu

from compress_tools.architectures.experts import ExpertWeights
from compress_tools.source.design_matrix import design_to_rows, expert_to_rows, rows_to_design, rows_to_expert


def random_expert(seed: int = 0) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    return ExpertWeights(*(torch.randn(shape, generator=generator) for shape in [(5, 3), (5, 3), (3, 5)]))


def forward(expert: ExpertWeights, x: torch.Tensor) -> torch.Tensor:
    return (silu(x @ expert.gate.T) * (x @ expert.up.T)) @ expert.down.T


def test_columns_are_gate_up_down_transposed() -> None:
    expert = random_expert()
    design = rows_to_design(expert_to_rows(expert))
    assert torch.equal(design, torch.cat([expert.gate, expert.up, expert.down.T], dim=1))


def test_there_and_back() -> None:
    expert = random_expert()
    rows = design_to_rows(rows_to_design(expert_to_rows(expert)), ("gate_proj", "up_proj", "down_proj"))
    back = rows_to_expert(rows)
    for name in ("gate", "up", "down"):
        assert torch.equal(getattr(back, name), getattr(expert, name))


def test_permuting_rows_keeps_the_experts_output() -> None:
    expert = random_expert()
    perm = torch.tensor([3, 0, 4, 1, 2])
    shuffled = rows_to_expert({p: rows[perm] for p, rows in expert_to_rows(expert).items()})
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(forward(shuffled, x), forward(expert, x))


def test_two_matrix_experts_have_two_blocks() -> None:
    expert = random_expert()
    rows = expert_to_rows(ExpertWeights(None, expert.up, expert.down))
    assert list(rows) == ["up_proj", "down_proj"]
    assert rows_to_expert(rows).gate is None
