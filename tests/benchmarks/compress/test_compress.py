"""The engine's benchmark on a small layer: real files, every stage timed, laws that its rows must show."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from benchmarks.compress.__main__ import TARGETS, layer_rows, pot_rows
from benchmarks.compress.pot import compare
from benchmarks.compress.run import STAGES, run_layer
from benchmarks.compress.source import KINDS, NOISE, Kind, write_source
from benchmarks.harness.shapes import SHAPES, MoEShape

SMALL = MoEShape("Qwen3-30B-A3B", hidden=64, intermediate=48, experts=4, top_k=2, layers=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_s_rows_say_what_was_measured(kind: Kind, tmp_path: Path) -> None:
    write_source(tmp_path / "source", SMALL, kind)
    # In a process of its own, as the benchmark does: else the peak is that of the tests before.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        run = pool.submit(run_layer, tmp_path / "source", tmp_path, SMALL, kind, workers=2, check_svd=True).result()
    assert set(run.seconds) == set(STAGES)
    assert all(seconds > 0 for seconds in run.seconds.values())
    assert all(later <= earlier for earlier, later in zip(run.objective, run.objective[1:], strict=False))
    if kind == "near-copied":
        expected = NOISE**2 / (1 + NOISE**2) * (1 - 1 / SMALL.experts)
        assert run.objective[-1] == pytest.approx(expected, rel=0.05)
    assert run.gap <= 1e-6
    assert -1e-6 < run.excess < 1e-3
    assert 0 < run.errors["prune"] < run.errors["low-rank"] < run.objective[-1]
    rows = layer_rows(run)
    assert [row.met for row in rows[:4]] == [True] * 4
    assert rows[0].value * 60 == pytest.approx(sum(run.seconds.values()))


def test_targets_are_for_known_shapes() -> None:
    assert set(TARGETS) <= set(SHAPES)


def test_pot_s_solver_is_scored_by_the_same_objective() -> None:
    found = compare(3, 40, 8, "unrelated", workers=1)
    objective, faster = pot_rows(found)
    assert objective.met
    assert found.our_objective <= found.pot_objective * (1 + 1e-6)
    assert faster.value == found.pot_s / found.our_s
    assert not found.pot_truncated
