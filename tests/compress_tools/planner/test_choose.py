"""From measured layers to a plan, on made-up measurements: budget, bounds, best single coder, and what is reported."""

from math import ceil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.config import make_config
from compress_tools.errors import ConfigError
from compress_tools.output.target import make_target
from compress_tools.planner.candidates import CenterBits, Coder, Sizes, menu, whole_ranks
from compress_tools.planner.choices import Choice, Rated, expert_groups
from compress_tools.planner.config import MENU_METHODS, Bounds, layer_bounds, make_planner_config
from compress_tools.planner.estimate import layer_seconds
from compress_tools.planner.frontier import Point, frontier
from compress_tools.planner.measure import LayerMeasurement, Sample
from compress_tools.planner.plan_file import parse_plan
from compress_tools.planner.plan_text import plan_text
from compress_tools.planner.planner import LayerChoices, Measured, choose
from compress_tools.residuals.budget import affordable_rank
from compress_tools.source.reader import CheckpointReader

TWO, THREE = (Coder(make_config(method="quantize", bits=bits), joint=False, centers=(0, 8)) for bits in (2, 3))
DENSE = 1000


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Sizes:
    """4 experts, H 64, I 48, three projections."""
    path = tmp_path_factory.mktemp("choose") / "m"
    save_tiny_model("mixtral", path, torch.bfloat16, num_local_experts=4, num_hidden_layers=1)
    return Sizes(make_target(CheckpointReader(path), make_config()).fmt)


def choice(coder: Coder, bits: CenterBits = 0) -> Choice:
    return Choice(((0, 1, 2, 3),), (bits,) * 3, ((coder,),) * 3)


def layer(two: tuple[int, float], three: tuple[int, float], *, exact: bool = True) -> LayerChoices:
    """Bytes and error of 2 and of 3 bits throughout, and the layer as it is."""
    points = [Point(*two, choice(TWO)), Point(*three, choice(THREE)), Point(DENSE, 0.0, None)]
    uniform = {(0, TWO): Point(*two, choice(TWO)), (0, THREE): Point(*three, choice(THREE))}
    return LayerChoices(frontier(points), uniform, exact)


@pytest.fixture
def measured(sizes: Sizes) -> Measured:
    """Layers 0 and 2 measured; layer 1 stays as it is."""
    layers = {0: layer((100, 0.6), (200, 0.2)), 2: layer((100, 0.3), (200, 0.1), exact=False)}
    return Measured(sizes, layers, {0: DENSE, 1: DENSE, 2: DENSE})


def ask(measured: Measured, planned_bytes: float, **options: object) -> dict[int, int]:
    """Bytes of each layer when layers 0 and 2 may take so many together."""
    found = choose(measured, make_planner_config(target_bytes_ratio=(DENSE + planned_bytes) / 3 / DENSE, **options))
    return {index: own.nbytes for index, own in found.layers.items()}


def test_the_budget_is_spent_to_the_byte(measured: Measured) -> None:
    assert ask(measured, 200.001) == {0: 100, 1: DENSE, 2: 100}
    assert ask(measured, 299) == {0: 100, 1: DENSE, 2: 100}
    assert ask(measured, 300.001) == {0: 200, 1: DENSE, 2: 100}
    assert ask(measured, 1200.001) == {0: DENSE, 1: DENSE, 2: 200}
    assert ask(measured, 1200.001, uniform=True) == {0: 200, 1: DENSE, 2: 200}


def test_reported_numbers(measured: Measured) -> None:
    request = make_planner_config(target_bytes_ratio=(DENSE + 300.5) / 3 / DENSE)
    found = choose(measured, request)
    assert found.error == pytest.approx((0.2 + 0 + 0.3) / 3)
    assert (found.expert_bytes_before, found.expert_bytes_after) == (3 * DENSE, DENSE + 300)
    label, error = found.best_uniform or ("", 0.0)
    assert (label, error) == ("no center; quantize, bits 2, group-size 128", pytest.approx((0.6 + 0.3) / 3))
    assert not found.exact
    assert found.layers[1].spec is None
    assert found.layers[0].spec == choice(THREE).spec(measured.sizes)
    text = plan_text(found, make_config(), request, "SRC", "0123")
    for words in (
        "# Expert bytes: 1300 of 3000 (0.4333). Error: relative squared error, estimated from a sample",
        "# Mean error of all layers: 0.166667",
        "# Mean error of the best single coder within the budget: 0.3 (no center;",
        "  0:  # error 0.2, 200 of 1000 bytes (0.2000)",
        "  1: dense # error 0, 1000 of 1000 bytes (1.0000)",
    ):
        assert words in text
    again = parse_plan(text, "plan")
    assert again.specs == {index: own.spec for index, own in found.layers.items()}
    assert again.request == "0123"


def test_the_smallest_possible_ratio_is_named_and_possible(measured: Measured) -> None:
    measured.layers[0] = layer((101, 0.6), (200, 0.2))  # 0.40033: rounded down it would not be possible
    with pytest.raises(ConfigError) as caught:
        ask(measured, 199)
    least = ceil((DENSE + 201) / 3 / DENSE * 1e4) / 1e4
    assert str(caught.value).endswith(f"the smallest possible is {least}")
    assert choose(measured, make_planner_config(target_bytes_ratio=least)).expert_bytes_after == DENSE + 201


def test_bounds_hold_to_the_byte(measured: Measured) -> None:
    assert ask(measured, 300.5, layer_bytes_ratio="0:..0.1") == {0: 100, 1: DENSE, 2: 200}
    assert ask(measured, 300.5, layer_bytes_ratio="2:0.2..") == {0: 100, 1: DENSE, 2: 200}
    assert ask(measured, 1000.5, layer_bytes_ratio="0:..0.2", uniform=True) == {0: 200, 1: DENSE, 2: 200}
    with pytest.raises(ConfigError, match="layer 0 could be stored as"):
        ask(measured, 300.5, layer_bytes_ratio="0:..0.09")
    with pytest.raises(ConfigError, match="no single coder keeps"):
        ask(measured, 1000.5, layer_bytes_ratio="0:..0.1,2:0.2..", uniform=True)


def test_a_single_coder_that_thinning_lost_is_taken(measured: Measured) -> None:
    measured.layers[0].uniform[0, THREE] = Point(190, 0.01, choice(THREE))
    found = choose(measured, make_planner_config(target_bytes_ratio=(DENSE + 390.5) / 3 / DENSE))
    assert (found.layers[0].nbytes, found.layers[0].error) == (190, 0.01)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("0:0.3..0.5", {0: Bounds(0.3, 0.5)}),
        ("0-1:..0.5,1:0.2..", {0: Bounds(0, 0.5), 1: Bounds(0.2, 1)}),
        ("7:0..1", {7: Bounds(0, 1)}),
        ("7:0.5..0.5", {7: Bounds(0.5, 0.5)}),
    ],
)
def test_bounds_are_read(text: str | None, expected: dict[int, Bounds]) -> None:
    assert layer_bounds(text, [0, 1, 7]) == dict.fromkeys([0, 1, 7], Bounds(0, 1)) | expected


@pytest.mark.parametrize("text", ["0:0.5..0.4", "0:..1.1", "0:1.2.3..", "0", "0:0.1", "x:..1", ""])
def test_bounds_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected LAYERS:LEAST\.\.MOST"):
        make_planner_config(target_bytes_ratio=0.3, layer_bytes_ratio=text)


ENERGIES = st.lists(st.floats(0.01, 100), min_size=2, max_size=8)


@settings(max_examples=100)
@given(ENERGIES)
def test_groups_divide_the_experts_by_energy_where_it_pays(energies: list[float]) -> None:
    """Of all splits the one of least ``prod mean_g^(n_g / E)``, if it is at least 2 % below the mean."""
    found = expert_groups(torch.tensor(energies, dtype=torch.float64), 2)
    assert sorted(expert for group in found for expert in group) == list(range(len(energies)))

    def value(groups: list[list[float]]) -> float:
        return float(torch.tensor([sum(g) / len(g) for g in groups for _ in g], dtype=torch.float64).log().mean())

    ordered = sorted(energies)
    splits = [value([ordered[:count], ordered[count:]]) for count in range(1, len(ordered))]
    own = value([[energies[expert] for expert in group] for group in found])
    if len(found) == 1:
        assert value([ordered]) - min(splits) < 0.02 + 1e-9
    else:
        assert own == pytest.approx(min(splits), abs=1e-9)
        assert value([ordered]) - own >= 0.02 - 1e-9
        assert max(energies[e] for e in found[0]) <= min(energies[e] for e in found[1])


def test_an_expert_without_energy_makes_no_group() -> None:
    assert expert_groups(torch.tensor([0.0, 1.0, 1.0]), 2) == ((0, 1, 2),)


def measurement() -> LayerMeasurement:
    """Expert 3 is harder; gate is easier than down; errors of 3 bits a quarter of those of 2."""
    energy = torch.tensor([1.0, 1.0, 1.0, 20.0], dtype=torch.float64)[:, None] * torch.tensor([1.0, 2.0, 4.0])
    errors = {(bits, coder): energy * share for bits in (0, 8) for coder, share in ((TWO, 0.1), (THREE, 0.025))}
    return LayerMeasurement(errors, {0: energy, 8: energy}, energy, exact=True)


def test_choices_are_rated_by_weights_bytes_and_groups(sizes: Sizes) -> None:
    found = measurement()
    weights = torch.rand(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rated = Rated(found, weights, sizes)
    for key, errors in found.errors.items():
        point = rated.uniform(*key)
        assert point.error == pytest.approx(float((errors * weights).sum()))
        assert point.nbytes == sizes.uniform(key[1], key[0])
    groups = ((0, 1, 2), (3,))
    points = rated.choices(groups, 10**9).points()
    assert points[-1] == Point(10**9, 0.0, None)
    smallest = rated.uniform(0, TWO)
    assert (points[0].nbytes, points[0].error) == (smallest.nbytes, pytest.approx(smallest.error))
    for point in points[:-1]:
        assert point.pick is not None
        assert point.pick.groups == groups
        error = nbytes = 0.0
        for number, (bits, coders) in enumerate(zip(point.pick.centers, point.pick.coders, strict=True)):
            nbytes += sizes.center(bits, (sizes.projections[number],))
            for experts, coder in zip(groups, coders, strict=True):
                for expert in experts:
                    error += float(found.errors[bits, coder][expert, number] * weights[expert, number])
                    nbytes += sizes.expert(coder.parts((sizes.projections[number],), sizes.rows, sizes.hidden_size))
        assert point.error == pytest.approx(error)
        assert point.nbytes == nbytes
    assert any(len(set(coders)) == 2 for point in points[:-1] for coders in point.pick.coders)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch_transformers"])
def test_every_size_is_the_formats_own(family: str, tmp_path: Path) -> None:
    """Biases included: by laying the whole output out."""
    path = save_tiny_model(family, tmp_path / "m", torch.bfloat16, save_original_format=family != "mixtral")
    reader = CheckpointReader(path)
    target = make_target(reader, make_config())
    own = Sizes(target.fmt)
    some = menu(own, MENU_METHODS, (0, 4, 8, 16), 0.3 * target.expert_bytes_before / len(target.source.layers))
    assert {coder.config.method for coder in some} == set(MENU_METHODS)
    for coder in some[::5]:
        for bits in coder.centers:
            width = len(own.projections)
            made = Choice((tuple(range(own.num_experts)),), (bits,) * width, ((coder,),) * width)
            laid_out = make_target(reader, make_config(), dict.fromkeys(target.source.layers, made.spec(own)))
            assert laid_out.expert_bytes_after == len(target.source.layers) * own.uniform(coder, bits), coder.label


def test_biases_count_in_every_choice(tmp_path: Path) -> None:
    path = save_tiny_model("gpt_oss", tmp_path / "m", torch.bfloat16, save_original_format=False)
    own = Sizes(make_target(CheckpointReader(path), make_config()).fmt)
    assert own.layer_biases > 0
    energy = torch.ones(own.num_experts, 3, dtype=torch.float64)
    found = LayerMeasurement({(0, TWO): energy}, {0: energy}, energy, exact=True)
    everyone = (tuple(range(own.num_experts)),)
    (apart, dense) = Rated(found, energy, own).choices(everyone, 10**9).points()
    assert apart.nbytes == own.uniform(TWO, 0)
    assert dense.pick is None


@pytest.mark.parametrize("share", [0.15, 0.3, 0.6])
def test_filling_coders_fill_the_budget(sizes: Sizes, share: float) -> None:
    """Joint coders come at the size that just fits: one value or one rank more would not."""
    budget = share * 4 * 3 * 48 * 64 * 2
    joint = [coder for coder in menu(sizes, ("prune", "low-rank"), (0, 8), budget) if coder.joint]
    assert len(joint) >= 4
    for coder in joint:
        used = sizes.uniform(coder, *coder.centers)
        assert used <= budget
        more = Coder(
            coder.config.model_copy(update={"retain_ratio": coder.config.retain_ratio + 0.02}), True, coder.centers
        )
        assert coder.config.retain_ratio > 0.979 or sizes.uniform(more, *coder.centers) > budget


def offered_ranks(rows: int, columns: int, *ratios: float) -> list[int]:
    """Ranks of one projection ``[rows, columns]`` that the menu makes of these ratios."""
    some = SimpleNamespace(rows=rows, hidden_size=columns)
    return [affordable_rank(rows, columns, ratio) for ratio in whole_ranks(some, ratios)]


def test_offered_ranks_are_those_that_gpu_kernels_take_whole() -> None:
    """Multiples of 64, or of 16 where those are too far off; what is smaller stays, and nothing is offered twice."""
    assert offered_ranks(1024, 2048, 0.05, 0.125, 0.25) == [32, 64, 192]
    assert offered_ranks(14336, 4096, 0.02, 0.06, 0.125) == [64, 192, 384]
    assert offered_ranks(48, 64, 0.05, 0.125, 0.25) == [1, 3, 6]
    assert offered_ranks(1024, 2048, 0.09, 0.1) == [64]


def test_the_estimate_grows_with_the_work(sizes: Sizes) -> None:
    whole, part = (Sample(experts, rows, torch.bfloat16, 0, 1) for experts, rows in ((0, 0), (2, 12)))
    plain = make_config(workers=1, center="none")
    few = layer_seconds(sizes, (TWO,), plain, whole)
    assert few == pytest.approx(2 * 4 * 48 * 192 / 1e7)  # two centers' candidates
    assert layer_seconds(sizes, (TWO, THREE), plain, whole) == pytest.approx(2 * few)
    assert layer_seconds(sizes, (TWO,), plain, part) == pytest.approx(few / 8)
    assert layer_seconds(sizes, (TWO,), make_config(workers=2, center="none"), whole) == pytest.approx(few / 2)
    assert layer_seconds(sizes, (TWO,), make_config(workers=64, center="none"), whole) == pytest.approx(few / 4)
    once = layer_seconds(sizes, (TWO,), make_config(workers=1, center="git-rebasin"), whole) - few
    assert once == pytest.approx(4 * 48**2 * 192 / 4e10)
    many = layer_seconds(sizes, (TWO,), make_config(workers=1), whole) - few
    assert many == pytest.approx(8 * once)
    low_rank = Coder(make_config(method="low-rank", retain_ratio=0.2), joint=True, centers=(0,))
    for sample, experts in ((whole, 4), (part, 2)):
        assert layer_seconds(sizes, (low_rank,), plain, sample) == pytest.approx(experts * 48**2 * 192 / 4e9)
