"""What the README promises to be, the page that is written from the commands, and figures against their rows."""

import json
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress_tools.version import __version__
from tests.docs.pages import PAGES, REPO, name

README = (REPO / "README.md").read_text(encoding="utf-8")
PERFORMANCE = (REPO / "docs/performance.md").read_text(encoding="utf-8")
QUALITY = (REPO / "docs/quality.md").read_text(encoding="utf-8")


def rows(file: str) -> list[dict[str, Any]]:
    """The rows of a file in benchmarks/results."""
    return json.loads((REPO / "benchmarks/results" / file).read_text())["rows"]


def table(text: str, heading: str) -> dict[str, list[str]]:
    """Cells by first cell, of the first table after ``heading``."""
    lines = text[text.index(heading) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    found = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        found[cells[0]] = cells[1:]
    return found


def test_readme_is_short():
    assert len(README.splitlines()) <= 130
    assert len(README.encode()) <= 9 * 1024


@pytest.mark.parametrize("page", [page for page in PAGES if not name(page).startswith("docs/notes/")], ids=name)
def test_targets_and_misses_stand_in_the_notes(page: Path):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"\(target|target [\d.]+|, missed|missed\)", text)


def test_the_commands_page_is_written_from_the_commands():
    module = runpy.run_path(str(REPO / "docs/tools/cli_page.py"))
    written = (REPO / "docs/cli.md").read_text(encoding="utf-8")
    assert written == module["cli_page"](), "run `python docs/tools/cli_page.py`"


def test_versions_agree():
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert citation["version"] == __version__
    assert citation["license"] == project["license"]


def test_pre_commit_and_workflow_run_what_make_and_ci_run():
    hooks = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for repo in hooks for hook in repo["hooks"]] == ["make check"]
    steps = yaml.safe_load((REPO / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]


def test_demo_table_is_the_rows():
    shown = table(README, "# ResMoE for vLLM")
    names = {
        "original": "original, bf16",
        "25 % of the bytes": "the default, 25 % of the bytes",
        "pruned 25 %": "pruned, 25 % kept",
        "low rank 25 %": "low rank, 25 % kept",
    }
    measured = rows("demo-cpu-avx512.json")
    assert {names[row["name"]] for row in measured} == set(shown)
    for row in measured:
        cells = [cell.split(" ")[0] for cell in shown[names[row["name"]]]]
        assert cells[0] == f"{row['expert_bytes_disk'] / 1e6:.2f}"
        assert cells[1] == f"{row['expert_bytes_resident'] / 1e6:.2f}"
        assert cells[2] == f"{row['perplexity']:.2f}"
        assert cells[3] == f"{row['tokens_per_s']:.1f}"


def test_demo_text_is_the_rows():
    original, *others = rows("demo-cpu-avx512.json")
    shares = [f"{100 * row['tokens_per_s'] / original['tokens_per_s']:.0f} %" for row in others]
    assert f"{shares[0]} (the default), {shares[1]} (pruned) and {shares[2]} (low rank) of the original" in PERFORMANCE
    first, pruned, low_rank = rows("demo-cpu.json")
    shown = ["{:.2f}".format(row["perplexity"]) for row in (first, pruned, low_rank)]
    assert f"perplexity {shown[0]}, {shown[1]} and {shown[2]}" in PERFORMANCE
    rates = [f"{row['tokens_per_s']:.1f}" for row in (first, pruned, low_rank)]
    assert f"{rates[0]}, {rates[1]} (pruned) and {rates[2]} (low rank) tokens/s" in PERFORMANCE


METHODS = {
    "low rank": "low-rank",
    "low rank, 8-bit": "low-rank-8bit",
    "4-bit codes, 8-bit center": "quantize-4bit",
    "4-bit trellis codes, 8-bit center": "trellis-4bit",
    "4-bit codes, 4-bit center": "quantize-4bit-center-4bit",
    "4-bit trellis codes, 4-bit center": "trellis-4bit-center-4bit",
    "bitmap": "prune",
}


@pytest.mark.parametrize(
    ("heading", "file"),
    [("### A layer with AVX-512", "moe-cpu-avx512.json"), ("### A layer with AVX2", "moe-cpu-avx2.json")],
)
def test_layer_table_is_the_rows(heading: str, file: str):
    shown = table(PERFORMANCE, heading)
    measured = {}
    for row in rows(file):
        if (match := re.match(r"(\S+), (\S+), T=(\d+)(: dense .*|, 1 thread)$", row["name"])) is not None:
            measured[match[1], match[2], int(match[3])] = row["value"]
    seen = 0
    for label, cells in shown.items():
        shape, _, method = label.partition(", ")
        for tokens, cell in zip((1, 4, 16, 64, 256, 1024), cells, strict=True):
            found = measured.get((shape, METHODS[method], tokens))
            assert cell == ("" if found is None else f"{found:.2f}"), (label, tokens)
            seen += bool(cell)
    assert seen == len(measured)


def test_server_table_is_the_rows():
    shown = table(PERFORMANCE, "## A whole server on the CPU")
    measured = {row["name"]: row["value"] for row in rows("serve-olmoe-cpu.json")}
    labels = {
        "dense": "original",
        "low rank, 25 % kept, 8-bit": "low-rank-8bit",
        "low rank, 25 % kept, bf16": "low-rank",
        "4-bit residuals, 8-bit center": "quantize-4bit",
    }
    for label, model in labels.items():
        resident, load, tpot, output = (cell.split(" ")[0] for cell in shown[label])
        assert resident == f"{measured[f'{model}: experts resident in the server']:,.0f}"
        assert abs(float(load) - measured[f"{model}: weight load"]) <= 0.051
        assert tpot == f"{measured[f'{model}: median TPOT at all at once, 1 in flight at most']:.1f}"
        assert output == f"{measured[f'{model}: output at all at once']:.2f}"
    ratio = measured["low-rank-8bit against original: decoding speed at all at once, 1 in flight at most"]
    assert f"{ratio:.2f} times" in README


@pytest.mark.parametrize(
    ("heading", "file"),
    [("### Beside llama.cpp", "llama-cpp-avx512.json"), ("#### With AVX2 alone", "llama-cpp-avx2.json")],
)
def test_llama_table_is_the_rows(heading: str, file: str):
    measured = {row["name"]: row["value"] for row in rows(file)}
    labels = {
        "a token's time, one stream": "a token's time, one stream",
        "first token, a prompt of 64": "first token, one prompt",
        "a prompt of 512 tokens": "prompt of 512 tokens",
        "first token, 8 prompts at once": "first token, 8 prompts at once",
        "output, 8 at once": "output, 8 at once",
        "peak memory of the server": "peak memory of the server's processes",
    }
    shown = table(PERFORMANCE, heading)
    assert set(shown) == set(labels)
    for label, key in labels.items():
        for model, cell in zip(("llama.cpp Q4_0", "vLLM dense", "ResMoE trellis 4 bits"), shown[label], strict=True):
            number = cell.split(" ")[0].replace(",", "")
            assert float(number) == round(measured[f"{model}, 1 thread: {key}"], len(number.partition(".")[2])), label


def test_compression_table_is_the_rows():
    measured = {row["name"]: row["value"] for row in rows("compress-cpu.json")}
    lines = PERFORMANCE[PERFORMANCE.index("## Compression") :].splitlines()
    shape, seen = "", 0
    for line in lines[next(i for i, text in enumerate(lines) if text.startswith("|---")) + 1 :]:
        if not line.startswith("|"):
            break
        layer, experts, minutes, memory, excess = (cell.strip() for cell in line.strip("|").split("|"))
        shape = layer.split(",")[0] or shape
        stem = f"{shape}, {experts}: "
        for cell, key in (
            (minutes, "alignment, center, both residuals, read and write"),
            (memory, "peak memory"),
            (excess, "SVD error over the exact tail"),
        ):
            shown = float(cell.split(" ")[0])
            digits = len(cell.split(" ")[0].partition(".")[2])
            assert shown == round(measured[stem + key], digits), (stem, key)
            seen += 1
    assert seen == 18


QUARTER, LESS = "## At a quarter of the bytes", "## With fewer bytes"
QUALITY_ROWS = {
    (QUARTER, "original"): ("original", "original", None),
    (QUARTER, "`--target-bytes-ratio 0.25`, the default"): ("bytes", "ResMoE planner", 0.25),
    (QUARTER, "the same, `--optimize output`"): ("bytes", "ResMoE planner, by output", 0.25),
    (QUARTER, "trellis 4-bit, no center"): ("bytes", "trellis 4-bit", None),
    (QUARTER, "plain 4-bit"): ("bytes", "plain 4-bit", None),
    (QUARTER, "GGUF Q4_0"): ("bytes", "GGUF Q4_0", None),
    (QUARTER, "GGUF Q8_0"): ("bytes", "GGUF Q8_0", None),
    (QUARTER, "plain pruning, 4-bit values"): ("bytes", "plain pruning, 4-bit values", 0.25),
    (QUARTER, "ResMoE (SVD), the paper's, bf16"): ("bytes", "ResMoE (SVD)", 0.25),
    (QUARTER, "ResMoE (UP), the paper's, bf16"): ("bytes", "ResMoE (UP)", 0.25),
    (QUARTER, "plain SVD"): ("bytes", "plain SVD", 0.25),
    (QUARTER, "plain pruning, bf16"): ("bytes", "plain pruning (UP)", 0.25),
    (LESS, "`--target-bytes-ratio 0.2`"): ("bytes", "ResMoE planner", 0.2),
    (LESS, "trellis 3-bit, no center"): ("bytes", "trellis 3-bit", None),
    (LESS, "plain 3-bit"): ("bytes", "plain 3-bit", None),
    (LESS, "`--target-bytes-ratio 0.15`"): ("bytes", "ResMoE planner", 0.15),
    (LESS, "the same, `--optimize output`"): ("bytes", "ResMoE planner, by output", 0.15),
    (LESS, "trellis 2-bit, no center"): ("bytes", "trellis 2-bit", None),
    (LESS, "plain 2-bit"): ("bytes", "plain 2-bit", None),
    (LESS, "`--target-bytes-ratio 0.1`"): ("bytes", "ResMoE planner", 0.1),
    (LESS, "at 0.1, `--optimize output`"): ("bytes", "ResMoE planner, by output", 0.1),
}


@pytest.mark.parametrize(("heading", "label"), QUALITY_ROWS)
def test_quality_table_is_the_rows(heading: str, label: str):
    section, method, ratio = QUALITY_ROWS[heading, label]
    size, *cells = table(QUALITY, heading)[label]
    for number, model in enumerate(("upcycled", "merged", "scratch")):
        (row,) = [
            row
            for row in rows("quality-cpu-avx512.json")
            if (row.get("model"), row.get("section"), row.get("method"), row.get("asked_ratio"))
            == (model, section, method, ratio)
        ]
        assert float(size.split()[0]) >= round(100 * row["bytes_disk"] / row["bytes_original"], 1)
        for cell, key in zip(cells[2 * number : 2 * number + 2], ("perplexity", "kl_nats"), strict=True):
            digits = len(cell.partition(".")[2])
            assert float(cell) == pytest.approx(row[key], abs=0.501 * 10**-digits), (label, model, key)
    assert len(cells) == 6


def test_architecture_names_every_room():
    text = (REPO / "docs/architecture.md").read_text(encoding="utf-8")
    packages = [
        path.parent for name in ("compress_tools", "resmoe_vllm") for path in (REPO / name).glob("*/__init__.py")
    ]
    assert len(packages) > 10
    assert [package.name for package in packages if f"`{package.name}/" not in text] == []


def test_install_page_lists_the_extras():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    listed = table((REPO / "docs/install.md").read_text(encoding="utf-8"), "## Extras")
    assert {extra.strip("`") for cell in listed for extra in cell.split(", ")} == set(project["optional-dependencies"])


def test_site_builds_without_a_warning(tmp_path: Path):
    # Not --quiet: it drops the warnings that --strict counts.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/repository/compress_tools/format/SPEC/index.html").is_file()
    assert "--quiet" not in re.findall(r"mkdocs build.*", (REPO / "Makefile").read_text())[0]


def test_code_names_pages_that_exist():
    """A comment or docstring may cite the repository's own pages, and no others."""
    folders = ("benchmarks", "compress_tools", "docker", "docs", "resmoe_vllm", "tests")
    sources = [
        path for folder in folders for path in (REPO / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h", ".sh")
    ]
    cited = {(path, page) for path in sources for page in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text())}
    assert len(cited) > 3
    assert [f"{path}: {page}" for path, page in cited if not (REPO / page).is_file()] == []
