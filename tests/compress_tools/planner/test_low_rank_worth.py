"""Low rank of large layers is measured where it could win, and only there."""

import pytest
import torch

from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.center.barycenter import CenterOptions, find_center
from compress_tools.config import make_config
from compress_tools.output.target import make_target
from compress_tools.planner.candidates import Coder, Sizes, menu
from compress_tools.planner.low_rank_worth import worth_factorising
from compress_tools.planner.measure import Sample, measure_layer
from compress_tools.source.reader import CheckpointReader

DENSE = 4 * 3 * 48 * 64 * 2


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Sizes:
    """4 experts, H 64, I 48."""
    path = tmp_path_factory.mktemp("low-rank") / "m"
    save_tiny_model("mixtral", path, torch.bfloat16, num_local_experts=4, num_hidden_layers=1)
    return Sizes(make_target(CheckpointReader(path), make_config()).fmt)


def kept(design: torch.Tensor, sizes: Sizes, ratio: float, fewest_bits: int = 1) -> tuple[tuple[Coder, ...], int]:
    """The low-rank coders that are left of the menu at this budget, and how many there were."""
    coders = menu(sizes, ("trellis", "low-rank", "low-rank+trellis"), (0,), ratio * DENSE)
    low_rank = tuple(coder for coder in coders if coder.factorises)
    codes = tuple(coder for coder in coders if not coder.factorises and coder.config.bits >= fewest_bits)
    found = find_center(design, CenterOptions("none"))
    measured = measure_layer(design, found, sizes.projections, codes, Sample(2, 8, torch.bfloat16, 0, 1))
    return worth_factorising(low_rank, measured, design, sizes, ratio * DENSE, 1), len(low_rank)


def test_noise_is_not_factorised(sizes: Sizes) -> None:
    design = torch.randn(4, 48, 192, generator=torch.Generator().manual_seed(0))
    some, all_of_them = kept(design, sizes, 0.25)
    assert all_of_them > 5
    # Of square matrices this small low rank beside 2 bits may come near 3 bits; alone it never does.
    assert not [coder for coder in some if coder.config.method == "low-rank"]


def test_what_is_of_low_rank_is(sizes: Sizes) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(4, 48, 2, generator=generator), torch.randn(4, 2, 192, generator=generator)
    noise = 0.01 * torch.randn(4, 48, 192, generator=generator)
    some, _ = kept(left @ right + noise, sizes, 0.25)
    assert [coder for coder in some if coder.config.method == "low-rank"]


@pytest.mark.parametrize(("ratio", "stays"), [(0.1, True), (0.9, False)])
def test_what_is_smaller_than_all_codes_stays_where_these_hardly_fit(
    sizes: Sizes, ratio: float, *, stays: bool
) -> None:
    design = torch.randn(4, 48, 192, generator=torch.Generator().manual_seed(0))
    some, _ = kept(design, sizes, ratio, fewest_bits=3)
    least = [coder for coder in some if coder.config.method == "low-rank" and coder.config.retain_ratio == 0.05]
    assert bool(least) == stays
