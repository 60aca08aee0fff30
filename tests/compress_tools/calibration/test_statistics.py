"""What errors count: against the change of an experts module's output that they make."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models.tiny_models import load_model, save_tiny_model
from compress_tools.calibration.statistics import LayerStatistics
from compress_tools.format.schema import Projection
from compress_tools.hf.dense_experts import expert_of, experts_module
from compress_tools.importance import COLUMNS, COUNTS, OUTPUT, ROUTING
from compress_tools.source.moe_source import MoESource, open_source
from compress_tools.source.source_reader import SourceReader

# A plain family; biases and a clamped, interleaved gate; two matrices; router weights on the inputs.
FAMILIES = ["mixtral", "gpt_oss", "nemotron_h", "llama4"]


def opened(family: str, folder: Path) -> tuple[nn.Module, MoESource]:
    path = save_tiny_model(family, folder / "model", torch.float32)
    source = open_source(SourceReader(path))
    model = load_model(path).requires_grad_(requires_grad=False)
    return model.get_submodule(experts_module(model, source.names, source.layers[0])), source


def called(dense: nn.Module, family: str, x: Tensor, ids: Tensor, weights: Tensor, count: int) -> Tensor:
    """The module's output, as its family calls it."""
    if family != "llama4":
        return dense(x, ids, weights)
    table = torch.zeros(len(x), count).scatter_(1, ids, weights)
    rows = (table.T.unsqueeze(-1) * x).flatten(0, 1)
    return dense(rows).view(count, len(x), -1).sum(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_makes_them_exact(family: str, tmp_path: Path) -> None:
    """Rows times columns are a mean over tokens of products, which with one token is the product of the means."""
    dense, source = opened(family, tmp_path)
    sizes, projections = source.sizes, source.projections
    statistics = LayerStatistics(dense, projections, sizes.num_experts, sizes.intermediate_size, sizes.hidden_size)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, sizes.hidden_size, generator=generator)
    ids, weights = torch.tensor([[1, 3]]), torch.tensor([[0.7, 0.2]])
    handle = dense.register_forward_pre_hook(statistics.hook, with_kwargs=True)
    before = called(dense, family, x, ids, weights, sizes.num_experts)
    handle.remove()
    found = statistics.tensors()
    assert found[COUNTS].tolist() == [int(expert in (1, 3)) for expert in range(sizes.num_experts)]
    part = found[ROUTING][1]
    checked: list[Projection] = []
    for projection in projections:
        for row, column in ((2, 5), (11, 17)):
            matrix = expert_of(dense, 1).matrix(projection)
            entry = (column, row) if projection == "down_proj" else (row, column)
            size = 1e-2
            matrix[entry] += size
            change = called(dense, family, x, ids, weights, sizes.num_experts) - before
            matrix[entry] -= size
            columns = 1 if projection == "down_proj" else found[COLUMNS][1, column]
            expected = part * found[projection][1, row] * columns * size**2
            torch.testing.assert_close(change.square().sum(), expected, rtol=5e-2, atol=1e-9)
        checked.append(projection)
    assert tuple(checked) == projections


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_over_tokens(family: str, tmp_path: Path) -> None:
    dense, source = opened(family, tmp_path)
    sizes = source.sizes
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, sizes.hidden_size, generator=generator)
    ids = torch.rand(40, sizes.num_experts - 1, generator=generator).topk(2).indices  # the last expert gets nothing
    weights = 0.1 + torch.rand(40, 2, generator=generator)
    whole = LayerStatistics(dense, source.projections, sizes.num_experts, sizes.intermediate_size, sizes.hidden_size)
    handle = dense.register_forward_pre_hook(whole.hook, with_kwargs=True)
    for chunk in (slice(0, 15), slice(15, 40)):
        called(dense, family, x[chunk], ids[chunk], weights[chunk], sizes.num_experts)
    handle.remove()
    found = whole.tensors()
    table = torch.zeros(40, sizes.num_experts).scatter_(1, ids, weights)
    assert torch.equal(found[COUNTS], (table > 0).sum(0))
    if family == "llama4":  # its inputs have the router's weights on them already
        columns = torch.stack([(own[:, None] * x)[own > 0].square().mean(0) for own in table.T[:-1]])
    else:
        torch.testing.assert_close(found[ROUTING], table.square().mean(0))
        squares = table.square()[:, :-1]
        columns = (squares.T @ x.square()) / squares.sum(0)[:, None]
    torch.testing.assert_close(found[COLUMNS][:-1], columns)
    assert not found[COLUMNS][-1].any()
    assert not found[OUTPUT][-1].any()
    assert (found[OUTPUT][:-1] > 0).all()
