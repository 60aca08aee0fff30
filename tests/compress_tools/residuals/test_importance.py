"""Coders that are told what errors count lose less of what counts; told that all count alike, what they lose anyway."""

import pytest
import torch
from torch import Tensor

from compress_tools.config import make_config
from compress_tools.format.codec import decode_residual
from compress_tools.format.schema import LayerSpec
from compress_tools.format.trellis import trellis_levels
from compress_tools.importance import Importance
from compress_tools.residuals.recipes import RECIPES
from compress_tools.residuals.registry import encode_residual
from compress_tools.residuals.svd import tail_energy
from compress_tools.residuals.viterbi import native
from compress_tools.residuals.viterbi.plain_torch import to_fixed, torch_search
from compress_tools.source.design_matrix import design_to_rows

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ROWS, COLUMNS = 24, 160


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def importance(spread: float) -> Importance:
    columns = torch.exp(spread * drawn(1, COLUMNS))
    rows = {p: torch.exp(spread * drawn(2 + n, ROWS)) for n, p in enumerate(PROJECTIONS)}
    return Importance(rows, {"gate_proj": columns, "up_proj": columns})


def lost(design: Tensor, counted: Importance, given: Importance | None, **options: object) -> float:
    """What an expert loses of what counts, coded with ``given``."""
    config = make_config(center="none", **options)
    parts = RECIPES[config.method](config, PROJECTIONS, ROWS, COLUMNS)
    spec = LayerSpec(center=(), residual=parts)
    stored = encode_residual(spec, design, torch.float32, 0, given)
    restored = decode_residual(spec, stored, COLUMNS)
    rows = design_to_rows(design, PROJECTIONS)
    return float(sum(counted.weighed(p, rows[p] - restored[p]).square().sum() for p in PROJECTIONS))


CODERS: list[tuple[dict[str, object], float]] = [
    ({"method": "trellis", "bits": 1}, 0.85),
    ({"method": "trellis", "bits": 2}, 0.85),
    ({"method": "trellis", "bits": 3, "group_size": 32}, 0.85),
    ({"method": "trellis", "bits": 4}, 0.85),
    ({"method": "quantize", "bits": 2}, 0.99),
    ({"method": "quantize", "bits": 4, "group_size": 64}, 0.99),
    ({"method": "prune", "retain_ratio": 0.2}, 0.8),
    ({"method": "prune", "retain_ratio": 0.2, "value_bits": 4}, 0.8),
    ({"method": "prune", "retain_ratio": 0.2, "value_bits": 8, "prune_rows": "equal"}, 0.95),
    ({"method": "low-rank", "retain_ratio": 0.3}, 0.95),
    ({"method": "low-rank", "retain_ratio": 0.3, "low_rank_form": "per-projection"}, 0.8),
    ({"method": "low-rank+trellis", "retain_ratio": 0.1, "bits": 2}, 0.85),
    ({"method": "low-rank+quantize", "retain_ratio": 0.1, "factor_bits": 8, "bits": 3}, 0.95),
]
NAMES = ["-".join(map(str, options.values())) for options, _ in CODERS]


@pytest.mark.parametrize(("options", "share"), CODERS, ids=NAMES)
def test_less_is_lost_of_what_counts(options: dict[str, object], share: float) -> None:
    design, counted = drawn(0, ROWS, 3 * COLUMNS), importance(1.0)
    assert lost(design, counted, counted, **options) < share * lost(design, counted, None, **options)
    scaled = Importance({p: 1e-12 * own for p, own in counted.rows.items()}, counted.columns)
    assert lost(design, counted, scaled, **options) == pytest.approx(
        lost(design, counted, counted, **options), rel=2e-3
    )


@pytest.mark.parametrize("options", [options for options, _ in CODERS], ids=NAMES)
def test_where_all_count_alike_nothing_changes(options: dict[str, object]) -> None:
    design, alike = drawn(0, ROWS, 3 * COLUMNS), importance(0.0)
    assert lost(design, alike, alike, **options) == pytest.approx(lost(design, alike, None, **options), rel=2e-3)


def test_low_rank_of_one_projection_is_the_best_there_is() -> None:
    design, counted = drawn(0, ROWS, 3 * COLUMNS), importance(1.0)
    config = make_config(method="low-rank", retain_ratio=0.4, low_rank_form="per-projection")
    rank = RECIPES["low-rank"](config, PROJECTIONS, ROWS, COLUMNS)[0].rank
    best = sum(tail_energy(counted.weighed(p, own), rank) for p, own in design_to_rows(design, PROJECTIONS).items())
    found = lost(design, counted, counted, method="low-rank", retain_ratio=0.4, low_rank_form="per-projection")
    assert found == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("spread", [0.5, 3.5], ids=["mild", "at the bounds"])
def test_cpp_finds_the_same_symbols_and_their_levels(bits: int, spread: float) -> None:
    """The levels that a search reports are those that its symbols decode to: no row takes a history it can't have."""
    x = to_fixed(25 * drawn(0, 5, 96))
    counts = torch.exp(spread * drawn(1, 5, 96)).clamp(1 / 32, 32)
    ratios = counts.roll(1, 1) / counts
    symbols, levels = native.search(native.load(), x, bits, 0, ratios)
    assert all(map(torch.equal, (symbols, levels), torch_search(x, bits, 0, ratios)))
    assert torch.equal(trellis_levels(symbols, bits), levels.float())
    alone = torch_search(x, bits, 96, torch.ones(5, 1))[1]
    errors = [(counts * (x / 32 - own).square()).sum() for own in (levels, alone)]
    assert errors[0] < (0.97 if spread < 1 else 0.6) * errors[1]
