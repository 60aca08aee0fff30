"""What `make soak` complains of, and that its load is the same each time."""

import itertools
from collections.abc import Callable

from benchmarks.soak.__main__ import complaints
from benchmarks.soak.load import Loaded
from benchmarks.soak.plan import SHARES, Plan

MIB = 2**20


def loaded(size: Callable[[int], int], outcome: str = "answered", **more: int) -> Loaded:
    """A hundred requests, and so many MiB behind each."""
    memory = [(ended, size(ended) * MIB) for ended in range(101)]
    return Loaded([[outcome] * 100], memory=memory, **more)


def flat(_ended: int) -> int:
    return 100


def growing(ended: int) -> int:
    return 100 + ended


def test_memory_of_the_warm_up_is_not_compared():
    assert complaints(loaded(flat), loaded(lambda ended: 100 + min(ended, 38))) == []


def test_memory_that_grows_behind_the_warm_up_is_complained_of():
    """By 50 MiB; and by 20, which may be."""
    assert complaints(loaded(flat), loaded(growing)) == [
        "memory grew by 50.0 MiB behind the warm-up, at most 24 may; the dense twin's: 0.0 MiB"
    ]
    assert complaints(loaded(flat), loaded(lambda ended: 100 + ended * 4 // 10)) == []


def test_what_the_twin_does_not_do_is_complained_of():
    broken = complaints(loaded(flat), loaded(flat, outcome="failed: 500", left=2))
    assert broken[0] == "request 0 of client 0: failed: 500; the dense twin: answered"
    assert broken[-1] == "2 requests were still there 30 s after the last client had gone"
    assert len(broken) == 101
    assert complaints(loaded(flat, outcome="cancelled"), loaded(flat)) == []


def test_each_round_of_a_client_has_every_kind_and_is_the_same_each_time():
    first, again = (list(itertools.islice(Plan(3, 256, 128).requests(1), 40)) for _ in range(2))
    assert first == again
    kinds = [request.kind for request in first[:20]]
    assert {kind: kinds.count(kind) for kind in SHARES} == SHARES
