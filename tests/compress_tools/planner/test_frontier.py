"""Frontiers and allocation against brute force over small integers."""

from itertools import product

import numpy as np
import pytest

from compress_tools.planner import frontier as module
from compress_tools.planner.allocate import allocate, smallest
from compress_tools.planner.frontier import Frontier, Point, combined, frontier, union


def points(seed: int, count: int) -> list[Point[int]]:
    generator = np.random.default_rng(seed)
    nbytes, errors = generator.integers(1, 40, count).tolist(), generator.integers(0, 30, count).tolist()
    return [Point(size, float(error), number) for number, (size, error) in enumerate(zip(nbytes, errors, strict=True))]


def least_error(choices: list[Point[int]], budget: float) -> float:
    return min((point.error for point in choices if point.nbytes <= budget), default=float("inf"))


@pytest.mark.parametrize("seed", range(8))
def test_a_frontier_loses_nothing_and_holds_nothing_idle(seed: int) -> None:
    choices = points(seed, 25)
    found = frontier(choices)
    assert found.nbytes.tolist() == sorted(set(found.nbytes.tolist()))
    assert found.errors.tolist() == sorted(set(found.errors.tolist()), reverse=True)
    for budget in range(45):
        index = found.best_within(budget)
        best = float("inf") if index is None else float(found.errors[index])
        assert best == least_error(choices, budget)
    for point in found.points():
        assert (choices[point.pick].nbytes, choices[point.pick].error) == (point.nbytes, point.error)


def test_of_equal_choices_the_first_is_kept() -> None:
    assert frontier([Point(5, 1.0, "a"), Point(5, 1.0, "b"), Point(7, 1.0, "c")]).picks == ["a"]


def test_parts_of_a_frontier() -> None:
    whole = frontier([Point(1, 9.0, "a"), Point(3, 5.0, "b"), Point(6, 2.0, "c")])
    assert list(whole.within(1, 6).picks) == ["a", "b", "c"]
    assert list(whole.within(2, 5.9).picks) == ["b"]
    assert list(whole.within(3, 3).picks) == ["b"]
    assert whole.shifted(10).nbytes.tolist() == [11, 13, 16]
    assert whole.shifted(10).errors.tolist() == [9, 5, 2]
    assert list(whole.map(str.upper).picks) == ["A", "B", "C"]
    assert [whole.best_within(nbytes) for nbytes in (0, 0.9, 1, 2.9, 3, 6, 100)] == [None, None, 0, 0, 1, 2, 2]
    assert union([whole, frontier([Point(2, 4.0, "d")])]).picks == ["a", "d", "c"]


@pytest.mark.parametrize("most", [20, 45, float("inf")])
@pytest.mark.parametrize("seed", range(4))
def test_sums_are_those_of_every_pair(seed: int, most: float) -> None:
    one, two = frontier(points(seed, 20)), frontier(points(seed + 100, 20))
    found = combined(one, two, lambda left, right: (left, right), most)
    pairs = [
        Point(left.nbytes + right.nbytes, left.error + right.error, (left.pick, right.pick))
        for left, right in product(one.points(), two.points())
        if left.nbytes + right.nbytes <= most
    ]
    assert [(p.nbytes, p.error) for p in found.points()] == [(p.nbytes, p.error) for p in frontier(pairs).points()]
    by_pick = {p.pick: p for p in pairs}
    assert all((by_pick[p.pick].nbytes, by_pick[p.pick].error) == (p.nbytes, p.error) for p in found.points())


def line(count: int, step: int) -> Frontier[int]:
    return Frontier(np.arange(count) * step + 1, np.arange(count, 0, -1.0), list(range(count)))


def test_thinned_sums_keep_both_ends_and_lose_less_than_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = line(30, 1), line(30, 30)
    everything = combined(one, two, lambda left, right: (left, right))
    monkeypatch.setattr(module, "MAX_POINTS", 50)
    thinned = combined(one, two, lambda left, right: (left, right))
    assert len(everything.nbytes) > 50 >= len(thinned.nbytes) - 1
    assert (thinned.nbytes[0], thinned.nbytes[-1]) == (everything.nbytes[0], everything.nbytes[-1])
    assert (thinned.errors[0], thinned.errors[-1]) == (everything.errors[0], everything.errors[-1])
    interval = (int(everything.nbytes[-1]) - int(everything.nbytes[0])) / 49
    for nbytes, error in zip(everything.nbytes.tolist(), everything.errors.tolist(), strict=True):
        index = thinned.best_within(nbytes + interval)
        assert index is not None
        assert thinned.errors[index] <= error


@pytest.mark.parametrize("thin", [False, True], ids=["", "thinned"])
@pytest.mark.parametrize("seed", range(5))
def test_allocations_are_the_best_within_every_budget(seed: int, thin: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [frontier(points(10 * seed + number, 12)) for number in range(3)]
    least = smallest(layers)
    assert least == sum(int(layer.nbytes.min()) for layer in layers)
    if thin:
        monkeypatch.setattr(module, "MAX_POINTS", 4)
    sums = [
        (sum(p.nbytes for p in triple), sum(p.error for p in triple))
        for triple in product(*(layer.points() for layer in layers))
    ]
    for budget in range(least, least + 60, 3):
        found = allocate(layers, budget)
        assert sum(found.nbytes) <= budget
        assert found.error == sum(found.errors)
        for layer, nbytes, error, pick in zip(layers, found.nbytes, found.errors, found.picks, strict=True):
            index = list(layer.picks).index(pick)
            assert (nbytes, error) == (int(layer.nbytes[index]), float(layer.errors[index]))
        best = min(error for nbytes, error in sums if nbytes <= budget)
        if thin:
            assert found.error >= best
            # nothing is left that would fit and help
            slack = budget - sum(found.nbytes)
            for layer, nbytes, error in zip(layers, found.nbytes, found.errors, strict=True):
                index = layer.best_within(nbytes + slack)
                assert index is not None
                assert float(layer.errors[index]) >= error
        else:
            assert found.error == best
