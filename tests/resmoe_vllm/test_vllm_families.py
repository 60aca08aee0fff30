"""Every family the whole way: compress, verify, restore, and the restored twin's log-probabilities."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.families import BF16, CHECKED_METHODS, check_family, family_table
from benchmarks.models.tiny_models import TINY_CONFIGS
from compress_tools.architectures.base import MoEArchitecture
from compress_tools.architectures.registry import ARCHITECTURES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


# Each family meets one method here, in turn; transformers takes all of them through both (test_transformers_loader).
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        pytest.param(
            known,
            CHECKED_METHODS[number % len(CHECKED_METHODS)],
            id=f"{known.model_type}-{CHECKED_METHODS[number % len(CHECKED_METHODS)]}",
        )
        for number, known in enumerate(ARCHITECTURES)
        if known.served_here
    ],
)
def test_family_equals_its_restored_twin(architecture: MoEArchitecture, method: str, tmp_path: Path) -> None:
    result = check_family(architecture, method, tmp_path, measure_change=False)
    assert result.max_deviation <= result.allowed


def test_every_family_has_a_tiny_model() -> None:
    assert {known.model_type for known in ARCHITECTURES} == set(TINY_CONFIGS)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda known: known.model_type)
def test_every_family_names_published_models_and_their_precision(architecture: MoEArchitecture) -> None:
    assert architecture.models
    precision = "(fp32|bf16|fp8|mxfp4|mxfp8|nvfp4|fp4|int4)"
    assert [
        name for name in architecture.models if not re.fullmatch(rf"\S.* \({precision}(, {precision})*\)", name)
    ] == []


def test_the_pages_table_is_the_registrys() -> None:
    assert family_table() in PAGE.read_text(encoding="utf-8")


def test_committed_rows_are_of_this_registry_and_the_page_says_them() -> None:
    rows = json.loads((PAGE.parents[1] / "benchmarks" / "results" / "families-cpu.json").read_text())["rows"]
    assert all(row["met"] for row in rows)
    engines = {
        known.model_type: ("vLLM in bf16" if known.model_type in BF16 else "vLLM")
        if known.served_here
        else "transformers"
        for known in ARCHITECTURES
    }
    found = {tuple(row["name"].partition(":")[0].split(", ")) for row in rows}
    families = {family for family, _, _ in found}
    assert found == {(family, method, engines[family]) for family in families for method in CHECKED_METHODS}
    largest = max(row["value"] for row in rows if "in bf16" not in row["name"])
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert (
        f"at most {largest:.1e} in log-probability to the restored twin, in fp32, for {len(families)} of them" in page
    )
