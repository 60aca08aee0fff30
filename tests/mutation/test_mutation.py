"""The mutation tool itself: edits of every kind, texts left alone, and a repository that stays as it is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutation.explained import Explanations
from tests.mutation.mutants import make_mutants
from tests.mutation.targets import REPOSITORY, TARGETS


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a < b", {"x = a <= b", "x = a >= b"}),
        ("x = a + b", {"x = a - b"}),
        ("x = a and b", {"x = a or b", "x = a", "x = b"}),
        ("x = not a", {"x = a"}),
        ("x = 3", {"x = 4", "x = 2"}),
        ("x = min(a, b)", {"x = max(a, b)"}),
        ("x = a.clone()", {"x = a"}),
        ("x = a[:n]", {"x = a[:n + 1]"}),
        ("f(x)", {"pass"}),
        ("x += y", {"x -= y", "pass"}),
        ("x = [y for y in z if y]", {"x = [y for y in z]"}),
        ("def f():\n    return a", {"def f():\n    return None"}),
        ("if a:\n    pass", {"if True:\n    pass", "if False:\n    pass"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kind_of_edit(source: str, expected: set[str]) -> None:
    assert {ast.unparse(mutant.tree) for mutant in make_mutants(source)} == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""Text of 3."""',
        "import a",
        "raise ValueError(3)",
        "x = f'{a + b}'",
        "def f(x: 'list[3]'): ...",
        "@f(3)\ndef g(): ...",
        "Rows = dict[str, a | b]",
        "log.info(3)",
        "x = zip(a, b, strict=True)",
    ],
)
def test_texts_types_and_messages_are_left_alone(source: str) -> None:
    assert list(make_mutants(source)) == []


def test_a_mutants_text_survives_moved_lines() -> None:
    source = "def f(a):\n    if a > 1:\n        return a\n"
    before, after = list(make_mutants(source)), list(make_mutants("\n\n" + source))
    assert [mutant.key for mutant in before] == [mutant.key for mutant in after]
    assert len({mutant.key for mutant in before}) == len(before)
    assert all(mutant.in_function for mutant in before)


def test_every_target_has_modules_and_tests() -> None:
    for target in TARGETS:
        assert target.files(), target.name
        assert any((REPOSITORY / path).exists() for path in target.tests), target.name


def test_explanations_have_a_module_and_a_reason() -> None:
    """Whether their mutants are still there is said by a run: a test would tie the list to every edit of a module."""
    for file, own in Explanations.read().reasons.items():
        assert (REPOSITORY / file).is_file(), file
        assert all(start and len(reason) > 10 for start, reason in own.items()), file


def test_an_explanation_fits_by_its_beginning_until_the_code_changes() -> None:
    explanations = Explanations({"a.py": {"f: return 1": "of no consequence"}})
    assert explanations.reason("a.py", "f: return 1: 1 -> 2") == "of no consequence"
    assert explanations.reason("b.py", "f: return 1: 1 -> 2") is explanations.reason("a.py", "g: x") is None
    assert explanations.stale("a.py", ["f: return 1: 1 -> 2"]) == explanations.stale("b.py", []) == []
    assert explanations.stale("a.py", ["f: return 2: 2 -> 3"]) == ["f: return 1"]


def test_a_mutant_is_killed_and_the_module_stays_as_it_is(tmp_path: Path) -> None:
    module = REPOSITORY / "compress_tools/format/quantization.py"
    before = module.read_bytes()
    command = [sys.executable, "-m", "tests.mutation", "format/quantization.py", "--mutant", "half_range: "]
    command += ["--per-module", "0", "--verbose", "--tests", "tests/compress_tools/format/test_format.py"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| compress_tools/format/quantization.py |" in done.stdout
    assert "survived " not in done.stderr
    assert done.stderr.count("killed ") >= 5
    assert module.read_bytes() == before
