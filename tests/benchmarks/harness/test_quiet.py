"""Waiting for a quiet machine, with probes that are made up."""

from collections.abc import Callable, Iterator

import pytest

from benchmarks.harness import quiet
from benchmarks.harness.quiet import Noise, Probe, QuietMachine

BEST = Probe(0.01, 0.02)
SLOW = Probe(0.01, 0.04)


@pytest.fixture
def no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "busy_seconds", lambda: 0.0)
    monkeypatch.setattr(quiet, "PAUSE_S", 0.0)
    monkeypatch.setattr(quiet, "REST_S", 0.0)


def probes(*then: Probe) -> Callable[[], Probe]:
    """Five of the best at first, as a machine takes when it is made; then these, the last one for ever."""
    every: Iterator[Probe] = iter([BEST] * 5 + list(then))
    last = then[-1]
    return lambda: next(every, last)


def test_two_quiet_probes_in_a_row_end_the_waiting(no_others: None) -> None:
    said: list[str] = []
    machine = QuietMachine(1, 60, probe=probes(BEST, SLOW, BEST, BEST, SLOW), own_seconds=lambda: 0.0, say=said.append)
    assert machine.wait() == BEST
    assert machine.probe() == SLOW  # four were taken
    assert len(said) == 1


def test_patience_ends_and_the_row_is_noisy(no_others: None) -> None:
    machine = QuietMachine(1, 0.05, probe=probes(SLOW), own_seconds=lambda: 0.0, say=lambda _: None)
    calls: list[int] = []
    result, noise = machine.measure(lambda: calls.append(1) or len(calls))
    assert result == len(calls) >= 1
    assert noise.is_noisy(machine.best)
    assert noise.context(machine.best)["probe_slowdown"] == pytest.approx(2)
    assert machine.patience_s <= 0


def test_a_quiet_measurement_is_taken_once(no_others: None) -> None:
    machine = QuietMachine(1, 60, probe=probes(BEST), own_seconds=lambda: 0.0)
    calls: list[int] = []
    _, noise = machine.measure(lambda: calls.append(1))
    assert len(calls) == 1
    assert not noise.is_noisy(machine.best)


def test_a_noisy_one_is_taken_again(no_others: None) -> None:
    machine = QuietMachine(1, 60, probe=probes(BEST, BEST, SLOW, BEST), own_seconds=lambda: 0.0)
    calls: list[int] = []
    _, noise = machine.measure(lambda: calls.append(1))
    assert len(calls) == 2
    assert not noise.is_noisy(machine.best)


def test_others_make_noise() -> None:
    assert Noise(BEST, BEST, 0.3).is_noisy(BEST)
    assert not Noise(BEST, BEST, 0.01).is_noisy(BEST)
    assert not Noise(BEST, BEST, None).is_noisy(BEST)


def test_a_better_probe_later_judges_what_came_before() -> None:
    assert Noise(SLOW, SLOW, 0.0).is_noisy(BEST)
    assert not Noise(SLOW, SLOW, 0.0).is_noisy(SLOW)


def test_the_real_probe_and_counters() -> None:
    probe = quiet.make_probe(1)()
    assert probe.loop_s > 0
    assert probe.read_gb_s > 0
    assert quiet.process_seconds() > 0
    busy = quiet.busy_seconds()
    assert busy is None or busy > 0
