"""Frontiers added up and allocated: brute force, both ends, what thinning leaves over."""

import itertools

import numpy as np
import pytest

from compress_tools.planner import frontier as frontiers
from compress_tools.planner.allocate import allocate, smallest
from compress_tools.planner.frontier import Frontier, Point, combined, frontier, union


def test_allocation_is_the_brute_force_optimum() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        layers = []
        for _ in range(4):
            sizes = generator.choice(100, 6, replace=False) + 1
            layers.append(frontier(Point(int(size), float(generator.random() / size), int(size)) for size in sizes))
        everything = list(itertools.product(*(zip(own.nbytes, own.errors, strict=True) for own in layers)))
        for budget in (sum(int(own.nbytes[0]) for own in layers), 90, 150, 400):
            fitting = [sum(e for _, e in picks) for picks in everything if sum(b for b, _ in picks) <= budget]
            if fitting:
                found = allocate(layers, budget)
                assert found.error == pytest.approx(min(fitting), rel=1e-12)
                assert sum(found.nbytes) <= budget


def test_thinning_loses_little(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    layers = []
    for _ in range(12):
        steps = np.cumsum(generator.integers(1000, 9000, 20))
        layers.append(frontier(Point(int(b), float(generator.uniform(0.9, 1.1) / b**2), int(b)) for b in steps))
    exact = [allocate(layers, budget).error for budget in (300000, 500000)]
    monkeypatch.setattr(frontiers, "MAX_POINTS", 256)
    thinned = [allocate(layers, budget).error for budget in (300000, 500000)]
    assert thinned == pytest.approx(exact, rel=0.01)


def test_combined_frontiers_keep_only_what_pays() -> None:
    left, right = frontier([Point(1, 3.0, "a"), Point(2, 5.0, "b"), Point(4, 1.0, "c")]), frontier([Point(1, 1.0, "d")])
    assert left.picks == ["a", "c"]
    both = combined(left, right, lambda one, other: one + other, most=4)
    assert both.points() == [Point(2, 4.0, "ad")]


def line(*points: tuple[int, float]) -> Frontier[str]:
    """Choices named by their bytes."""
    return frontier(Point(nbytes, error, str(nbytes)) for nbytes, error in points)


def test_equal_choices_keep_the_first_and_equal_errors_the_smaller() -> None:
    tied = frontier([Point(3, 2.0, "late"), Point(1, 2.0, "a"), Point(1, 2.0, "b"), Point(2, 2.0, "c")])
    assert tied.points() == [Point(1, 2.0, "a")]
    assert union([line((5, 1.0)), line((2, 3.0), (5, 0.5))]).points() == [Point(2, 3.0, "2"), Point(5, 0.5, "5")]
    assert frontier([]).points() == []


def test_ends_are_within() -> None:
    some = line((10, 3.0), (20, 2.0), (30, 1.0))
    assert some.within(10, 20).picks == ["10", "20"]
    assert some.within(11, 29).picks == ["20"]
    assert [some.best_within(nbytes) for nbytes in (9, 10, 29, 30, 99)] == [None, 0, 1, 2, 2]
    assert some.shifted(5).nbytes.tolist() == [15, 25, 35]
    pairs = combined(some, some, lambda one, other: (one, other), most=40)
    assert [(point.nbytes, point.error) for point in pairs.points()] == [(20, 6.0), (30, 5.0), (40, 4.0)]


def test_thinning_keeps_both_ends_and_the_best_of_each_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontiers, "MAX_POINTS", 4)
    many = line(*((nbytes, 100.0 - nbytes) for nbytes in range(1, 10)))
    alone = line((0, 0.0))
    thinned = combined(many, alone, lambda one, _: one)
    # Intervals of (9 - 1) / 3 bytes from the smallest on: the last of each, and the smallest of all.
    assert thinned.picks == ["1", "3", "6", "8", "9"]
    few = line(*((nbytes, 100.0 - nbytes) for nbytes in range(1, 5)))
    assert combined(few, alone, lambda one, _: one).picks == few.picks


def test_the_smallest_fits_exactly_and_slack_is_spent_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [line((10, 3.0), (20, 2.5)), line((10, 3.0), (20, 1.0)), line((10, 9.0), (25, 8.0))]
    assert smallest(layers) == 30
    assert allocate(layers, 30).picks == ("10", "10", "10")
    assert allocate(layers, 39).picks == ("10", "10", "10")
    found = allocate(layers, 40)
    assert (found.picks, found.nbytes, found.errors, found.error) == (
        ("10", "20", "10"),
        (10, 20, 10),
        (3.0, 1.0, 9.0),
        13.0,
    )
    assert allocate(layers[:1], 20).picks == ("20",)
    # Thinned to almost nothing, what is left over still goes where the error falls most.
    monkeypatch.setattr(frontiers, "MAX_POINTS", 2)
    assert allocate(layers, 55).error == 12.0
    assert allocate(layers, 65).picks == ("20", "20", "25")


def test_slack_is_spent_until_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What thinning leaves over: no single layer could still be stored better within the budget."""
    monkeypatch.setattr(frontiers, "MAX_POINTS", 2)
    generator = np.random.default_rng(0)
    for _ in range(200):
        layers = [
            line(*zip(np.cumsum(generator.integers(1, 20, 4)), -np.sort(-generator.integers(1, 50, 4)), strict=True))
            for _ in range(4)
        ]
        budget = smallest(layers) + int(generator.integers(0, 80))
        found = allocate(layers, budget)
        assert sum(found.nbytes) <= budget
        for own, nbytes, error in zip(layers, found.nbytes, found.errors, strict=True):
            better = own.best_within(nbytes + budget - sum(found.nbytes))
            assert better is not None
            assert own.errors[better] == error


def test_slack_goes_first_where_the_error_falls_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontiers, "MAX_POINTS", 2)
    layers = [
        line((10, 31), (28, 27), (33, 14), (35, 13)),
        line((3, 40), (21, 39), (37, 38), (39, 31)),
        line((5, 44), (15, 36), (24, 29), (39, 25)),
        line((10, 38), (26, 36), (41, 31), (43, 8)),
    ]
    # Thinned sums end at (10, 3, 5, 43): the 29 bytes left pay most in layer 0.
    assert allocate(layers, 90).picks == ("35", "3", "5", "43")
