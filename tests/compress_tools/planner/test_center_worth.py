"""Whether a center could pay, decided on a sample: none that would have paid is missed, and none is sought in vain."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.center.barycenter import CenterOptions, find_center, spread
from compress_tools.config import make_config
from compress_tools.output.target import make_target
from compress_tools.planner import center_worth
from compress_tools.planner.budget import plan_for_budget
from compress_tools.planner.candidates import Sizes, menu
from compress_tools.planner.center_worth import WORTH, could_pay, hopeful_shares
from compress_tools.planner.choices import Rated
from compress_tools.planner.config import make_planner_config
from compress_tools.planner.measure import LayerMeasurement, Sample, measure_layer
from compress_tools.progress.listener import Silent
from compress_tools.source.reader import CheckpointReader
from tests.compress_tools.planner.test_planner import make_model

SHARES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
EXPERTS = (2, 12)
RATIOS = (0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.4)
ROWS, HIDDEN = 48, 64


def related(experts: int, share: float, *, permuted: bool, seed: int = 0) -> Tensor:
    """Design matrices whose residuals hold about this share of the energy, of rows with norms of their own."""
    generator = torch.Generator().manual_seed(1000 * seed + round(100 * share) + experts)

    def rows() -> Tensor:
        scale = torch.exp(0.3 * torch.randn(ROWS, 1, generator=generator))
        return scale * torch.randn(ROWS, 3 * HIDDEN, generator=generator)

    common, made = rows(), []
    for _ in range(experts):
        own = (1 - share) ** 0.5 * common + share**0.5 * rows()
        made.append(own[torch.randperm(ROWS, generator=generator)] if permuted else own)
    return torch.stack(made)


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Sizes]:
    """By number of experts."""
    found = {}
    for experts in EXPERTS:
        path = tmp_path_factory.mktemp("worth") / "m"
        save_tiny_model("mixtral", path, torch.bfloat16, num_local_experts=experts, num_hidden_layers=1)
        found[experts] = Sizes(make_target(CheckpointReader(path), make_config()).fmt)
    return found


def rated(measured: LayerMeasurement, sizes: Sizes) -> Rated:
    return Rated(measured, torch.ones_like(measured.energies) / measured.energies.sum(), sizes)


def at(measured: LayerMeasurement, sizes: Sizes, dense: int, budget: float) -> float:
    """The least error at these bytes, where layers make up for each other's steps."""
    groups = (tuple(range(sizes.num_experts)),)
    return float(np.interp(budget, *center_worth._hull(rated(measured, sizes).choices(groups, dense))))


@pytest.mark.parametrize("permuted", [False, True], ids=["in order", "permuted"])
@pytest.mark.parametrize("experts", EXPERTS)
def test_no_center_that_pays_is_missed(experts: int, permuted: bool, sizes: dict[int, Sizes]) -> None:
    """From equal experts to unrelated ones, at several budgets: all candidates measured, against the forecast."""
    own, sample = sizes[experts], Sample(2, 8, torch.bfloat16, seed=0, workers=1)
    dense, groups = experts * 3 * ROWS * HIDDEN * 2, (tuple(range(experts)),)
    coders = tuple(coder for coder in menu(own, ("trellis", "quantize"), (0, 4, 8), 0.0) if not coder.config.group_size)
    paid = refused = 0
    for share in SHARES:
        design = related(experts, share, permuted=permuted)
        found = find_center(design, CenterOptions("barycenter"))
        shares = hopeful_shares(design, 3, workers=1)
        # Optimistic: never above what the real center leaves.
        assert found.center is not None
        left = spread(design, found.perm, found.center) / float(design.double().square().sum())
        assert float(shares.mean()) <= left + 1e-6
        everything = measure_layer(design, found, own.projections, coders, sample)
        alone = {key: errors for key, errors in everything.errors.items() if key[0] == 0}
        without = LayerMeasurement(alone, {0: everything.residuals[0]}, everything.energies, exact=True)
        for ratio in RATIOS:
            budget = ratio * dense
            pays = could_pay(rated(without, own), coders, shares, groups, dense, budget)
            gained = at(everything, own, dense, budget) < (1 - WORTH) * at(without, own, dense, budget)
            assert pays or not gained, (share, ratio)
            paid += gained
            refused += not pays
    assert paid > 3
    assert refused > 3


def test_neither_workers_nor_batches_change_the_shares() -> None:
    design = related(4, 0.5, permuted=True)
    one = hopeful_shares(design, 3, workers=1)
    assert all(torch.equal(one, hopeful_shares(design, 3, workers)) for workers in (2, 3, 7))


def test_of_zeros_a_center_leaves_nothing() -> None:
    assert torch.equal(hopeful_shares(torch.zeros(3, 8, 12), 3, workers=1), torch.zeros(3, dtype=torch.float64))


class Listening(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_unrelated_experts_are_not_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    source = make_model("random", tmp_path / "model")
    monkeypatch.setattr(center_worth, "ALIGNED_AT_ONCE", 0)
    monkeypatch.setattr("compress_tools.center.barycenter.align_experts", None)
    request, listener = make_planner_config(target_bytes_ratio=0.22, coders="trellis,quantize"), Listening()
    plan = plan_for_budget(source, make_config(workers=1), request, listener)
    said = [line for line in listener.said if "no center was looked for" in line]
    assert [line.partition(":")[0] for line in said] == ["layer 0", "layer 1"]
    assert all(f"# Layer {line.removeprefix('layer ')}\n" in plan.text for line in said)
    alone = plan_for_budget(source, make_config(workers=1, center="none"), request)
    assert plan.specs == alone.specs
    again = plan_for_budget(source, make_config(workers=3), request)
    assert again.text == plan.text


def test_a_center_that_pays_is_found_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    source = make_model("near copies", tmp_path / "model")
    request = make_planner_config(target_bytes_ratio=0.25, coders="trellis,quantize")
    before = plan_for_budget(source, make_config(workers=1), request)
    monkeypatch.setattr(center_worth, "ALIGNED_AT_ONCE", 0)
    plan = plan_for_budget(source, make_config(workers=1), request)
    assert plan.text == before.text
    assert any(spec is not None and spec.center for spec in plan.specs.values())


def test_where_one_layer_alone_has_a_center_the_best_single_coder_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    source = make_model("near copies", tmp_path / "model")
    monkeypatch.setattr(center_worth, "ALIGNED_AT_ONCE", 0)
    answers = iter([True, False])
    monkeypatch.setattr("compress_tools.planner.planner.could_pay", lambda *_: next(answers))
    request = make_planner_config(target_bytes_ratio=0.3, coders="trellis,quantize")
    found = plan_for_budget(source, make_config(workers=1), request).found
    assert found is not None
    assert found.best_uniform is not None
    assert found.best_uniform[0].startswith("no center; ")
    assert list(found.skipped) == [1]
    assert found.error <= found.best_uniform[1]
