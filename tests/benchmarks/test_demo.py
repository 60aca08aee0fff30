"""The demo with a tiny model: train, compress twice, serve three times, compare."""

import json
from pathlib import Path

import pytest

from benchmarks.demo import run_demo
from benchmarks.models.reference_models import preset_config


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_demo_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    config = preset_config("tiny", context_length=256, eval_tokens=512)
    run_demo(tmp_path, config)
    rows = {row["name"]: row for row in json.loads((tmp_path / "summary.json").read_text())["rows"]}
    assert list(rows) == ["original", "pruned 25 %", "low rank 25 %"]

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
