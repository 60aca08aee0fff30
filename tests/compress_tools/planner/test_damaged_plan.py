"""Text that is no plan, however odd: one sentence that names the file."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_tools.errors import ConfigError
from compress_tools.planner.plan_file import parse_plan

PLAN = """\
version: 1
center: mean
max_iterations: 5
tolerance: 0.1
seed: 0
layers:
  0: dense
  1:
    center: []
    residual:
    - {method: quantized, projections: [gate_proj, up_proj, down_proj], bits: 2}
"""
ODD = [
    "\x00",
    "a: b\nc: \x07",
    "[" * 5000,
    "{" * 3000,
    "- " * 3000,
    "a: &x [*x]",
    "&a a: *a",
    "? [a]\n: b",
    "? {a: b}\n: 1",
    "a: !!python/object:os.system x",
    "a: !!int x",
    "a: !!float x",
    "a: !!timestamp x",
    "a: !!binary x",
    "a: !!bool x",
    "a: 2020-99-99",
    "2020-99-99: a",
    "9" * 5000,
    "--- a\n--- b",
]


def outcome(text: str) -> str:
    """How many layers a plan has, or why it is none."""
    try:
        return f"{len(parse_plan(text, 'plan.yaml').specs)} layers"
    except ConfigError as err:
        return str(err)


@pytest.mark.parametrize("text", ODD, ids=lambda text: repr(text[:20]))
def test_what_yaml_or_python_chokes_on(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^plan.yaml: ") as caught:
        parse_plan(text, "plan.yaml")
    assert len(str(caught.value).splitlines()) == 1


@settings(max_examples=200)
@given(
    begin=st.integers(0, len(PLAN)),
    count=st.integers(0, 30),
    new=st.one_of(st.text(max_size=8), st.sampled_from(["[", "{", "!!int x", "&a", "*a", ": ", "\n", "1e999", "-1"])),
)
def test_an_edited_plan_is_read_or_refused(begin: int, count: int, new: str) -> None:
    assert outcome(PLAN) == "2 layers"
    assert outcome(PLAN[:begin] + new + PLAN[begin + count :]).startswith(("1 layers", "2 layers", "plan.yaml: "))
