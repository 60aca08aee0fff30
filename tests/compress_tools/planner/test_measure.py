"""Measured errors: of each candidate alone, whatever else is on the menu, and those of the coders that write."""

import pytest
import torch
from torch import Tensor

from compress_tools.center.barycenter import CenterOptions, find_center
from compress_tools.config import make_config
from compress_tools.format.schema import Projection, TrellisResidual
from compress_tools.planner.candidates import Coder
from compress_tools.planner.measure import TRELLIS_WEIGHTS, LayerMeasurement, Sample, measure_layer
from compress_tools.residuals.trellis import encode_trellis
from compress_tools.source.design_matrix import design_to_rows

PROJECTIONS: tuple[Projection, ...] = ("gate_proj", "up_proj", "down_proj")
LOW_RANK = {"method": "low-rank", "factor_bits": 8}
BOTH = {"method": "low-rank+quantize", "factor_bits": 8}
CODERS = (
    Coder(make_config(**LOW_RANK, retain_ratio=0.1), joint=False, centers=(0, 8)),
    Coder(make_config(**LOW_RANK, retain_ratio=0.3), joint=False, centers=(0, 8)),
    Coder(make_config(**LOW_RANK, retain_ratio=0.2), joint=True, centers=(0, 8)),
    Coder(make_config(**BOTH, retain_ratio=0.1, bits=2), joint=False, centers=(0, 8)),
    Coder(make_config(**BOTH, retain_ratio=0.1, bits=3), joint=False, centers=(0, 8)),
    Coder(make_config(**BOTH, retain_ratio=0.2, bits=3), joint=False, centers=(0, 8)),
    Coder(make_config(method="quantize", bits=3), joint=False, centers=(0, 8)),
    Coder(make_config(method="prune", retain_ratio=0.3, value_bits=4), joint=True, centers=(0, 8)),
)


def design(experts: int = 3, rows: int = 24, hidden_size: int = 32) -> Tensor:
    """Experts with something in common."""
    generator = torch.Generator().manual_seed(11)
    common = torch.randn(rows, 3 * hidden_size, generator=generator)
    return common + 0.5 * torch.randn(experts, rows, 3 * hidden_size, generator=generator)


def measured(coders: tuple[Coder, ...], experts: int = 0, rows: int = 0) -> LayerMeasurement:
    weights = design()
    sample = Sample(experts, rows, torch.bfloat16, seed=0, workers=1)
    return measure_layer(weights, find_center(weights, CenterOptions()), PROJECTIONS, coders, sample)


@pytest.mark.parametrize(("experts", "rows"), [(0, 0), (2, 9)], ids=["whole", "sample"])
def test_errors_do_not_depend_on_the_menu(experts: int, rows: int) -> None:
    forwards = measured(CODERS, experts, rows).errors
    backwards = measured(CODERS[::-1], experts, rows).errors
    assert forwards.keys() == backwards.keys()
    for key, error in forwards.items():
        torch.testing.assert_close(backwards[key], error, rtol=0, atol=0)
    for coder in CODERS:
        for key, error in measured((coder,), experts, rows).errors.items():
            torch.testing.assert_close(forwards[key], error, rtol=0, atol=0)


def test_more_is_less_error() -> None:
    errors = {key: float(error.sum()) for key, error in measured(CODERS).errors.items()}
    for bits in (0, 8):
        few, more, _, two_bits, three_bits, higher_rank = (errors[bits, coder] for coder in CODERS[:6])
        assert few > more > two_bits > three_bits
        assert few > higher_rank
    residuals = measured(CODERS).residuals
    for (bits, _), error in errors.items():
        assert 0 < error < float(residuals[bits].sum())


def test_a_part_is_scaled_by_the_residuals_energy() -> None:
    whole, part = measured(CODERS), measured(CODERS, experts=2, rows=12)
    assert whole.exact
    assert not part.exact
    for bits in (0, 8):
        torch.testing.assert_close(part.residuals[bits], whole.residuals[bits])
    torch.testing.assert_close(part.energies, whole.energies)
    for key, error in whole.errors.items():
        assert float(part.errors[key].sum()) == pytest.approx(float(error.sum()), rel=0.25), key[1].label


def test_energies_are_of_weights_and_residuals() -> None:
    weights = design()
    found = measured(CODERS)
    expected = weights.double().square().reshape(3, 24, 3, 32).sum((1, 3))
    torch.testing.assert_close(found.energies, expected)
    torch.testing.assert_close(found.residuals[0], expected)  # no center: the residual is the weight
    assert (found.residuals[8] < 0.5 * expected).all()


@pytest.mark.parametrize("group_size", [0, 128])
def test_trellis_codes_of_large_matrices_are_predicted_well(group_size: int) -> None:
    """Rows of long tails and of unlike sizes; against what the encoder makes of all of them."""
    torch.manual_seed(3)
    rows, columns = 160, 512
    sizes = torch.exp(0.5 * torch.randn(1, rows, 1))
    weights = sizes * torch.distributions.StudentT(6.0).sample(torch.Size((1, rows, 3 * columns)))
    assert rows * columns > TRELLIS_WEIGHTS
    coders = tuple(
        Coder(make_config(method="trellis", bits=bits, group_size=group_size), joint=False, centers=(0,))
        for bits in (1, 2, 3, 4)
    )
    found = find_center(weights, CenterOptions("none"))
    sampled = measure_layer(weights, found, PROJECTIONS, coders, Sample(0, 0, torch.bfloat16, seed=0, workers=1))
    assert not sampled.exact
    for coder in coders:
        part = TrellisResidual(projections=PROJECTIONS, bits=coder.config.bits, group_size=group_size or None)
        restored = part.decode(encode_trellis(weights[0], part, torch.bfloat16, 0), columns)
        left = design_to_rows(weights[0], PROJECTIONS)
        exact = sum(float((left[p] - restored[p]).square().sum()) for p in PROJECTIONS)
        assert float(sampled.errors[0, coder].sum()) == pytest.approx(exact, rel=0.1), coder.label
