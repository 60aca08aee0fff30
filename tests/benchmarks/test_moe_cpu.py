"""The CPU layer's benchmark at a tiny shape, and its targets."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import moe_cpu
from benchmarks.harness.quiet import Noise, Probe
from benchmarks.harness.shapes import SHAPES, MoEShape
from benchmarks.moe_cpu import FLOOR, Measured, comparisons, markdown, row
from resmoe_vllm.kernels.cpu.build import chosen_path, missing_cpu_flags

BEST = Probe(0.01, 0.02)
QUIET, NOISY = Noise(BEST, BEST, 0.0), Noise(BEST, BEST, 0.9)


def measured(method: str, tokens: int, resmoe_ms: float, noise: Noise = QUIET, shape: str = "OLMoE-1B-7B") -> Measured:
    return Measured(SHAPES[shape], method, tokens, 1, [4.0, 4.0, 8.0], [resmoe_ms] * 3, noise)


@pytest.mark.parametrize(
    ("method", "tokens", "shape", "target"),
    [
        ("trellis-4bit", 1, "OLMoE-1B-7B", 2.5),
        ("quantize-4bit-center-4bit", 16, "Qwen3-30B-A3B", 1.5),
        ("quantize-4bit", 1024, "DeepSeekMoE-16B", 1.0),
        ("trellis-4bit", 64, "Mixtral-8x7B", 0.95),
        ("low-rank", 1, "Mixtral-8x7B", 1.2),
        ("low-rank-8bit", 16, "Mixtral-8x7B", 2.2),
        ("prune", 16, "OLMoE-1B-7B", 1.0),
        ("trellis-4bit", 4, "OLMoE-1B-7B", FLOOR),
        ("quantize-3bit", 1, "OLMoE-1B-7B", FLOOR),
    ],
)
def test_targets(method: str, tokens: int, shape: str, target: float) -> None:
    found = row(measured(method, tokens, 4.0 / target, shape=shape), BEST)
    assert found.target == target
    assert found.value == pytest.approx(target)


def test_a_row_says_its_bound_and_its_noise() -> None:
    found = row(measured("trellis-4bit", 1, 2.0, NOISY), BEST).context
    assert found["noisy"]
    assert found["others_share"] == 0.9
    assert found["path"] == chosen_path()
    # the share is the bound's of the time
    assert found["share_of_bandwidth"] == pytest.approx(found["bytes_bound_ms"] / 2.0)
    # 8 experts of 64 with 3 matrices in 4 bits, and a center in 8, without scales: at least
    assert found["bytes_bound_ms"] * BEST.read_gb_s * 1e6 > 3 * 1024 * 2048 * (8 / 2 + 1)


def test_trellis_is_compared_with_plain_codes() -> None:
    class Machine:
        best = BEST

    rows = comparisons(
        [measured("quantize-4bit", 1, 2.0), measured("trellis-4bit", 1, 2.4, NOISY), measured("low-rank", 1, 1.0)],
        {1: Machine()},  # type: ignore[dict-item]  it needs no more than the best probe
    )
    ratio = next(found for found in rows if "beside plain codes" in found.name)
    assert ratio.value == pytest.approx(1.2)
    assert not ratio.met
    assert ratio.context["noisy"]
    assert sum("share of the read test" in found.name for found in rows) == 2


def test_markdown_has_a_column_for_each_number_of_tokens() -> None:
    rows = [row(measured("prune", 1, 2.0), BEST), row(measured("prune", 16, 4.0, NOISY), BEST)]
    assert markdown(rows).splitlines()[1:] == [
        "| 1 thread | T = 1 | 16 |", "|---|---|---|", "| OLMoE-1B-7B, prune | 2.00 | (1.00) |",
    ]  # fmt: skip


@pytest.mark.skipif(bool(missing_cpu_flags()), reason="the processor has no C++ kernel")
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", MoEShape("tiny", 64, 32, 4, 2, 1))
    threads = torch.get_num_threads()
    file = tmp_path / "rows.json"
    options = ["--method", "trellis-4bit", "--seconds", "0.01", "--patience", "0", "--threads", "1"]
    shapes = moe_cpu.main.params[0]
    monkeypatch.setattr(shapes, "type", type(shapes.type)(list(SHAPES)))
    try:
        for tokens in ("1", "3"):
            done = CliRunner().invoke(
                moe_cpu.main, ["--shape", "tiny", "--tokens", tokens, *options, "--json", str(file)]
            )
            assert done.exit_code == 0, done.output
    finally:
        torch.set_num_threads(threads)
    rows = {found["name"]: found for found in json.loads(file.read_text())["rows"]}
    # the first call's rows have stayed
    assert {"tiny, trellis-4bit, T=1, 1 thread", "tiny, trellis-4bit, T=3, 1 thread"} < set(rows)
    assert all(found["value"] > 0 for found in rows.values())
