"""The demo with a tiny model: train, compress twice, serve three times, compare."""

import json
from pathlib import Path

import pytest

from benchmarks.demo import DemoRow, print_table, run_demo
from benchmarks.harness.environment import collect_environment
from benchmarks.models.reference_models import preset_config


def row(name: str, tokens_per_s: float) -> DemoRow:
    return DemoRow(name, 10**6, 10**6, 40.0, tokens_per_s, "text", -1.0, 100, 32, 16, "vllm serve x", 1.0)


def test_a_slower_model_is_said_to_be_slower(capsys: pytest.CaptureFixture[str]):
    print_table([row("original", 393), row("pruned", 297), row("low rank", 401)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Slower than the original on this machine: pruned at 76% of its 393.0 tokens/s." in shown
    assert collect_environment().hardware in shown
    print_table([row("original", 393), row("low rank", 393)])
    assert "Slower" not in capsys.readouterr().out


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_demo_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    config = preset_config("tiny", context_length=256, eval_tokens=512)
    run_demo(tmp_path, config)
    rows = {row["name"]: row for row in json.loads((tmp_path / "summary.json").read_text())["rows"]}
    assert list(rows) == ["original", "25 % of the bytes", "pruned 25 %", "low rank 25 %"]

    original = rows.pop("original")
    expert = 3 * config.hidden_size * config.intermediate_size * 2
    plain = config.num_layers * config.num_experts * expert
    assert original["expert_bytes_disk"] == original["expert_bytes_resident"] == plain
    for row in rows.values():
        # A center and a quarter of each expert, with masks and row pointers: less than all experts.
        assert row["expert_bytes_disk"] < plain
        assert row["expert_bytes_resident"] < plain
        # The format lets a loader add no more than row pointers.
        pointers = config.num_layers * config.num_experts * 3 * config.intermediate_size * 4
        assert 0 <= row["expert_bytes_resident"] - row["expert_bytes_disk"] <= pointers
        assert original["perplexity"] * 0.9 < row["perplexity"] < original["perplexity"] * 2
    for row in [original, *rows.values()]:
        assert row["tokens_per_s"] > 0
        assert row["sample"]
        words = [word for word in row["server_command"].split() if not word.startswith("VLLM_CPU_KVCACHE_SPACE=")]
        assert words[:2] == ["vllm", "serve"]
        assert words[3] == "--port"
        assert len(words) == 5
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert "held-out perplexity" in capfd.readouterr().out
