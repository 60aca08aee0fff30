"""The compile matrix: its judgement on rows written by hand, a small part of it compiled, and the census of variants.

The compiler can't be had in this process, where Triton may be its interpreter: what compiles runs in one of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compiled.cards import CARDS
from benchmarks.compiled.matrix import ALLOWED, UNSAID, Allowed, by_label, cell_of, excesses, read_rows, sources_hash
from benchmarks.compiled.recorder import Launch
from benchmarks.harness.environment import REPO

LOOP = {
    "instructions": 64,
    "barriers": 2,
    "products": 8,
    "macs": 16384,
    "copies": 4,
    "loads": 0,
    "two_bytes": {},
    "wide_gathers": 0,
}
KERNEL = {"shared": 36864, "registers": 96, "spilled": 0, "loops": [LOOP], "block_m": 16, "warps": 4}
KEY = "sm_89 low-rank hidden few"


def row_of(tokens: int = 1, card: str = "sm_89", **changes: Any) -> dict[str, Any]:
    """A row of one kernel, right in everything that is not changed."""
    cell = {name: changes.pop(name) for name in ("method", "dtype") if name in changes}
    loop = LOOP | {name: changes.pop(name) for name in list(changes) if name in LOOP}
    return {
        "card": card,
        "shape": "OLMoE-1B-7B",
        "method": "low-rank",
        "dtype": "bfloat16",
        "tokens": tokens,
        "sources": sources_hash(),
        "kernels": {"hidden": KERNEL | {"loops": [loop]} | changes},
    } | cell


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({}, None),
        ({"shared": 102400}, "shared"),
        ({"registers": 255, "warps": 8}, "blocks"),
        ({"registers": 255, "warps": 8, "tokens": 65}, None),
        ({"spilled": 8}, "spills"),
        ({"copies": 0}, "copies"),
        ({"copies": 0, "card": "gfx942", "shared": 16384}, None),
        ({"two_bytes": {"_rows_tile": 3}}, "loads"),
        ({"two_bytes": {"_rows_tile": 2}}, None),
        ({"two_bytes": {"_kept_column": 3}}, None),
        ({"wide_gathers": 3}, "gathers"),
        ({"instructions": 72}, "instructions"),
        ({"instructions": 67}, None),
        ({"instructions": 67, "dtype": "float16"}, None),
        ({"dtype": "float32"}, "listed"),
        ({"method": "prune"}, "listed"),
    ],
)
def test_each_check(changes: dict[str, Any], check: str | None) -> None:
    row = row_of(**changes)
    budget = {f"{row['card']} low-rank hidden {few}": 2.0 for few in ("few", "many")}
    found = {one.check for one in excesses(row, budget)}
    # a block that fits nowhere does not fit twice, either
    assert found - {"blocks"} == {check} - {None, "blocks"}
    assert ("blocks" in found) == (check in ("blocks", "shared"))


def test_what_a_compiler_refuses_is_a_finding() -> None:
    (found,) = excesses(row_of() | {"kernels": {"hidden": {"error": "PassManager::run failed"}}}, {})
    assert (found.check, found.key) == ("compiles", KEY)
    assert "PassManager" in found.words


def test_worse_than_what_is_known() -> None:
    (found,) = excesses(row_of(spilled=16), {KEY: 2.0})
    assert Allowed({}, {}).worse(found)
    assert not Allowed({}, {"spills": {KEY: 16}}).worse(found)
    assert Allowed({}, {"spills": {KEY: 8}}).worse(found)


def test_accepting_replaces_what_these_rows_say_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.compiled.matrix.ALLOWED", tmp_path / "allowed.json")
    other = "sm_90 low-rank hidden few"
    known = {"spills": {other: 8.0, KEY: 99.0}, "copies": {KEY: 1.0}}
    allowed = Allowed({other: 3.0, KEY: 9.0}, known, {"spills": {other: "small", KEY: "seldom"}})
    allowed.accept([row_of(spilled=16), row_of(tokens=4, spilled=24), row_of(tokens=4, spilled=24, copies=0)])
    assert allowed.budget == {KEY: 2.0, other: 3.0}
    assert allowed.known == {"copies": {KEY: 1}, "spills": {KEY: 24, other: 8}}
    assert allowed.why == {"copies": {KEY: UNSAID}, "spills": {KEY: "seldom", other: "small"}}
    assert Allowed.read() == allowed
    assert allowed.text().splitlines()[2] == '  "sm_89 low-rank few": {"hidden": 2.0},'


def test_each_kernel_of_a_call_has_one_label() -> None:
    """By what it is launched for, however often; numbered where that takes several kernels."""
    roles = [("first", "a"), ("restore-sides", "b"), ("restore-sides", "c"), ("restore-sides", "b"), ("more", "a")]
    launches = [Launch("_kernel", "", None, 4, error=error, role=role) for role, error in roles]
    found = by_label(launches)
    assert list(found) == ["first", "restore-sides.1", "restore-sides.2", "more"]
    assert [launch.error for launch in found.values()] == ["a", "b", "c", "a"]


def test_rows_of_other_kernels_do_not_count(tmp_path: Path) -> None:
    rows = [row_of(), row_of(tokens=4) | {"sources": "others"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text + text[:40])
    assert list(read_rows(tmp_path)) == [cell_of(rows[0])]


def test_what_is_allowed_is_sorted_and_whole() -> None:
    allowed = Allowed.read()
    assert list(allowed.budget) == sorted(allowed.budget)
    assert {len(key.split()) for key in allowed.budget} == {4}
    assert allowed.text() == ALLOWED.read_text()


def test_every_known_finding_says_why() -> None:
    allowed = Allowed.read()
    known = {(check, key) for check, own in allowed.known.items() for key in own}
    assert {(check, key) for check, own in allowed.why.items() for key in own} == known
    assert {key for _, key in known} <= allowed.budget.keys()
    assert UNSAID not in {why for own in allowed.why.values() for why in own.values()}


def test_every_card_is_looked_at() -> None:
    cards = {key.split()[0] for key in Allowed.read().budget}
    assert cards == set(CARDS)


def compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the package, by the compiler and not the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", *arguments]
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)


def test_a_part_of_the_matrix(tmp_path: Path) -> None:
    """Two cards of different makers, what is known to be wrong, and nothing worse."""
    cells = ["--shape", "OLMoE-1B-7B", "--method", "low-rank", "--dtype", "bfloat16", "--tokens", "1"]
    done = compiled("benchmarks.compiled", "--card", "sm_89", "gfx942", *cells, "--folder", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "2 of 2 cells; 0 findings that allowed.json does not have"
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["card"] for row in rows] == ["sm_89", "gfx942"]
    for row in rows:
        loops = [loop for kernel in row["kernels"].values() for loop in kernel["loops"]]
        assert len(loops) >= 4, "first, hidden, shrink, last"


def test_the_interpreter_is_refused() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.compiled"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unset TRITON_INTERPRET" in done.stderr


def test_variants_of_a_layer_are_few() -> None:
    """Up to 16384 tokens; those that no captured graph meets would be compiled while a request waits."""
    done = compiled("benchmarks.compiled.census", "--shape", "Mixtral-8x7B", "--method", "low-rank", "prune")
    assert done.returncode == 0, done.stderr
    counted = [line.split() for line in done.stdout.splitlines() if line.startswith("Mixtral")]
    assert [words[1] for words in counted] == ["low-rank:", "prune:"]
    for words in counted:
        assert int(words[2]) <= 32, "variants that Triton compiles"
        assert int(words[words.index("met") - 1]) <= 3, "variants that a request would wait for"
