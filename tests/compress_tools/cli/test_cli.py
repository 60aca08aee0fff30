"""The command as a person or a script sees it: exit codes, one clear sentence, JSON on stdout alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models.tiny_models import save_tiny_model
from tests.compress_tools.cli.conftest import Resmoe


def test_as_a_process_of_its_own(tiny_mixtral: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "compress_tools", "plan", tiny_mixtral, "--layers", "9"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "resmoe: --layers 9: no experts in layers [9]; MoE layers are 0-2\n"


def test_the_whole_way(resmoe: Resmoe, tiny_mixtral: Path, tmp_path: Path) -> None:
    def resmoe_json(*words: object) -> Any:
        code, stdout, stderr = resmoe(*words, "--json")
        assert code == 0, stderr
        return json.loads(stdout)

    planned = resmoe_json("plan", tiny_mixtral, "--method", "low-rank")
    assert planned == resmoe_json("compress", tiny_mixtral, tmp_path / "x", "--method", "low-rank", "--dry-run")
    assert not (tmp_path / "x").exists()
    report = resmoe_json("compress", tiny_mixtral, tmp_path / "small", "--method", "low-rank")
    assert report["expert_bytes_after"] == planned["expert_bytes"]["after"]
    inspected = resmoe_json("inspect", tmp_path / "small")
    assert sum(layer["bytes_disk"] for layer in inspected["layers"]) == report["expert_bytes_after"]
    verified = resmoe_json("verify", tmp_path / "small", "--against", tiny_mixtral)
    assert [layer["layer"] for layer in verified["layers"]] == [0, 1, 2]
    restored = resmoe_json("restore", tmp_path / "small", tmp_path / "dense")
    assert restored["total_bytes"] == planned["total_bytes"]["before"]
    for words in (("plan", tiny_mixtral), ("inspect", tmp_path / "small"), ("verify", tmp_path / "small")):
        code, stdout, _ = resmoe(*words)
        assert code == 0
        assert "layer" in stdout


def test_a_dry_run_of_a_slice_says_its_layers(resmoe: Resmoe, tiny_mixtral: Path, tmp_path: Path) -> None:
    words = ("compress", tiny_mixtral, tmp_path / "x", "--method", "prune", "--dry-run")
    code, stdout, _ = resmoe(*words, "--shard", "2/2", "--json")
    assert code == 0
    content = json.loads(stdout)
    assert (content.pop("slice"), content.pop("slice_layers")) == ([2, 2], [1, 2])
    assert content == json.loads(resmoe(*words, "--json")[1])
    assert resmoe(*words, "--shard", "2/2")[1].endswith("Slice 2/2 makes layers 1, 2 of these.\n")


def test_slices_and_merge(resmoe: Resmoe, tiny_mixtral: Path, tmp_path: Path) -> None:
    target = tmp_path / "small"
    for shard in ("2/2", "1/2"):
        code, stdout, stderr = resmoe(
            "compress", tiny_mixtral, target, "--method", "prune", "--shard", shard, "--center", "mean", "--resume"
        )
        assert code == 0, stderr
        assert f"resmoe merge {target}" in stdout.replace("\n", "")
    code, stdout, stderr = resmoe("merge", target, "--remove-slices", "--json")
    assert code == 0, stderr
    assert [layer["layer"] for layer in json.loads(stdout)["layers"]] == [0, 1, 2]
    assert resmoe("verify", target, "--against", tiny_mixtral)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "small",
        "small.log",
        "small.shard-1-of-2.log",
        "small.shard-2-of-2.log",
    ]


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["compress", "{missing}", "{new}"], 4, "no such directory"),
        (["compress", "{model}", "{new}", "--retain-ratio", "1.5"], 2, "--retain-ratio"),
        (["compress", "{model}", "{new}", "--retain-ratio", "much"], 2, "not a valid float"),
        (["compress", "{model}", "{new}", "--method", "magic"], 2, "'prune', 'low-rank'"),
        (
            ["compress", "{model}", "{new}", "--method", "prune", "--bits", "3"],
            2,
            "--bits 3 has no effect with --method prune",
        ),
        (
            ["compress", "{model}", "{new}", "--method", "prune", "--bits", "4"],
            2,
            "--bits has no effect with --method prune",
        ),
        (["compress", "{model}", "{new}", "--method", "quantize", "--bits", "5"], 2, "'5' is not one of"),
        (["compress", "{model}", "{new}", "--layers", "9"], 2, "MoE layers are 0-2"),
        (["compress", "{model}", "{new}", "--resume", "--overwrite"], 2, "exclude each other"),
        (["compress", "{model}", "{new}", "--device", "banana"], 2, "--device banana"),
        (["compress", "{model}", "{model}"], 2, "same directory"),
        (["compress", "{model}"], 2, "Missing argument"),
        (["compress", "{model}", "{new}", "--shard", "5/4"], 2, "--shard 5/4: expected I/N"),
        (["compress", "{model}", "{new}", "--shard", "0/4"], 2, "--shard 0/4: expected I/N"),
        (["compress", "{model}", "{new}", "--shard", "a/b"], 2, "--shard a/b: expected I/N"),
        (["compress", "{model}", "{new}", "--method", "prune", "--shard", "1/4"], 2, "at most 3 slices"),
        (["compress", "{model}", "/"], 4, "root of a file system"),
        (["merge", "{new}"], 4, "no slices new.shard-I-of-N"),
        (["merge", "{new}", "{model}"], 4, "not a slice"),
        (["merge", "{new}", "--resume", "--overwrite"], 2, "exclude each other"),
        (["merge"], 2, "Missing argument"),
        (["inspect", "{model}"], 4, "not a ResMoE checkpoint"),
        (["verify", "{missing}"], 4, "no such directory"),
        (["restore", "{model}", "{new}"], 4, "not a ResMoE checkpoint"),
        (["restore", "{model}", "{model}", "--overwrite"], 2, "same directory"),
        (["eval", "{model}", "--text", "{model}/config.json", "--limit", "5"], 2, "--limit has no effect with --text"),
        (["plan", "{model}", "--target-bytes-ratio", "0.5", "--out", "{model}"], 2, "is a directory"),
        (["plan", "{model}", "--target-bytes-ratio", "0.5", "--out", "/proc/none/x"], 2, "no directory /proc/none"),
        (["plan", "{model}", "--target-bytes-ratio", "0.5", "--out", "{model}/config.json"], 2, "pass --overwrite"),
        (["probe", "{model}", "--picture", "/sys/x.png"], 2, "can't be written"),
        (["dance"], 2, "No such command"),
    ],
    ids=lambda value: "-".join(value[:1] + value[3:]) if isinstance(value, list) else None,
)
def test_refusals(
    resmoe: Resmoe, words: list[str], code: int, sentence: str, tiny_mixtral: Path, tmp_path: Path
) -> None:
    names = {"model": tiny_mixtral, "missing": tmp_path / "missing", "new": tmp_path / "new"}
    found, stdout, stderr = resmoe(*(word.format(**names) for word in words))
    assert (found, stdout) == (code, ""), stderr
    assert sentence in stderr
    assert not list(tmp_path.iterdir())


def test_a_plan_says_what_it_predicts_and_replaces_a_file_only_when_told(
    resmoe: Resmoe, tiny_mixtral: Path, tmp_path: Path
) -> None:
    words = "plan", tiny_mixtral, "--target-bytes-ratio", "0.4", "--out", tmp_path / "plan.yaml"
    (tmp_path / "plan.yaml").write_text("edited")
    assert resmoe(*words)[0] == 2
    assert (tmp_path / "plan.yaml").read_text() == "edited"
    code, stdout, stderr = resmoe(*words, "--overwrite")
    assert code == 0, stderr
    text = (tmp_path / "plan.yaml").read_text()
    mean = next(line for line in text.splitlines() if line.startswith("# Mean error of all layers"))
    row = next(line.split() for line in stdout.splitlines() if " mean " in line)
    assert float(row[-2]) == pytest.approx(float(mean.rpartition(": ")[2]), rel=1e-3)
    assert "best single coder" in stdout


def test_a_target_size_says_what_remains_for_the_kv_cache(resmoe: Resmoe, tiny_mixtral: Path, tmp_path: Path) -> None:
    size = sum(file.stat().st_size for file in tiny_mixtral.glob("*.safetensors")) * 8 // 10
    words = "--target-size", size, "--coders", "trellis"
    config = json.loads((tiny_mixtral / "config.json").read_text())
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    cached = config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * width * 2  # keys and values, bf16
    each = f"the cache takes {cached} B a token in bf16"
    for command in (("plan", tiny_mixtral), ("compress", tiny_mixtral, tmp_path / "out")):
        code, stdout, _ = resmoe(*command, *words)
        assert code == 0
        said = " ".join(stdout.split())
        assert "On a card of 8 GiB, of which vLLM takes 92%," in said
        assert "remain for the KV cache" in said
        assert each in said


def test_a_family_that_vllm_cannot_serve_is_not_sent_there(resmoe: Resmoe, tmp_path: Path) -> None:
    source = save_tiny_model("switch_transformers", tmp_path / "model", torch.bfloat16)
    code, stdout, stderr = resmoe("compress", source, tmp_path / "small", "--method", "prune", "--center", "mean")
    assert code == 0, stderr
    assert "vllm serve" not in stdout
    assert "runs in transformers only" in " ".join(stdout.split())
    card = (tmp_path / "small" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "vllm serve" not in card


def test_the_cards_command_is_accepted(resmoe: Resmoe, tiny_mixtral: Path, tmp_path: Path) -> None:
    options = "--method", "prune", "--value-bits", "8", "--center", "mean"
    assert resmoe("compress", tiny_mixtral, tmp_path / "small", *options)[0] == 0
    card = (tmp_path / "small" / "README.md").read_text()
    line = next(line for line in card.splitlines() if line.startswith("resmoe compress"))
    again = [tmp_path / "again" if word == "small" else word for word in line.split()[1:]]
    code, _, stderr = resmoe(*again)
    assert code == 0, stderr
    for name in ("config.json", "resmoe_report.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "small" / name).read_bytes()


def test_by_default_a_quarter_of_the_bytes_is_planned_for(resmoe: Resmoe, tiny_mixtral: Path, tmp_path: Path) -> None:
    """`plan`, `--dry-run` and `compress` without options say and write what `--target-bytes-ratio 0.25` does."""
    quick = ("--coders", "quantize", "--center", "none")
    asked = ("--target-bytes-ratio", "0.25")
    said = []
    for words in (
        ("plan", tiny_mixtral, *quick, "--out", tmp_path / "plan.yaml"),
        ("plan", tiny_mixtral, *quick, *asked),
        ("compress", tiny_mixtral, tmp_path / "none", *quick, "--dry-run"),
    ):
        code, stdout, stderr = resmoe(*words, "--json")
        assert code == 0, stderr
        said.append(json.loads(stdout))
    assert said[0] == said[1] == said[2]
    assert not (tmp_path / "none").exists()
    for name, words in (("default", ()), ("asked", asked)):
        code, stdout, stderr = resmoe("compress", tiny_mixtral, tmp_path / name, *quick, *words, "--json")
        assert code == 0, stderr
        report = json.loads(stdout)
        assert report["expert_bytes_ratio"] <= 0.25
        assert report["expert_bytes_after"] == said[0]["expert_bytes"]["after"]
    plans = [
        (tmp_path / name).read_text() for name in ("plan.yaml", "default/resmoe_plan.yaml", "asked/resmoe_plan.yaml")
    ]
    assert plans[0] == plans[1] == plans[2]
    # The same request, however it is said: a finished run is recognised.
    assert resmoe("compress", tiny_mixtral, tmp_path / "default", *quick, *asked, "--resume")[0] == 0


def test_with_layers_the_default_is_a_quarter_of_those_layers(resmoe: Resmoe, tiny_mixtral: Path) -> None:
    words = ("plan", tiny_mixtral, "--coders", "quantize", "--center", "none", "--layers", "top:1", "--json")
    code, stdout, stderr = resmoe(*words)
    assert code == 0, stderr
    found = json.loads(stdout)
    assert [layer for layer, spec in found["plan"]["layers"].items() if spec != "dense"] == ["2"]
    whole = found["expert_bytes"]["before"]
    # Two of three equal layers stay as they are.
    assert 0.1 * whole / 3 < found["expert_bytes"]["after"] - 2 * whole / 3 <= 0.25 * whole / 3 + 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--bits", "3"],
            "--bits needs --method quantize or low-rank+quantize or trellis or low-rank+trellis; without",
        ),
        (["--bits", "8"], "--bits needs --method quantize or low-rank+quantize; without a method the planner chooses"),
        (["--bits", "1"], "--bits needs --method trellis or low-rank+trellis; without"),
        (["--retain-ratio", "0.25"], "--retain-ratio needs --method prune or low-rank or low-rank+quantize or "),
        (["--value-bits", "8"], "--value-bits needs --method prune; without"),
        (["--center-bits", "8"], "--center-bits needs --method prune or low-rank or quantize or "),
        (["--retain-ratio", "1.5"], "--retain-ratio needs --method; without a method the planner chooses"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
@pytest.mark.parametrize("command", ["plan", "compress"])
def test_an_option_of_a_coder_needs_one(
    resmoe: Resmoe, command: str, words: list[str], sentence: str, tiny_mixtral: Path, tmp_path: Path
) -> None:
    dst = [tmp_path / "new"] if command == "compress" else []
    code, stdout, stderr = resmoe(command, tiny_mixtral, *dst, *words)
    assert (code, stdout) == (2, "")
    assert sentence in stderr
    assert stderr.endswith("for --target-bytes-ratio 0.25 or the budget you name\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [("--method", "trellis"), ("--plan", "{plan}")], ids=lambda words: words[0])
def test_a_method_or_a_plan_reads_no_weights(
    words: tuple[str, ...], resmoe: Resmoe, tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "plan.yaml"
    assert resmoe("plan", tiny_mixtral, "--coders", "quantize", "--center", "none", "--out", plan)[0] == 0
    given = [word.format(plan=plan) for word in words]
    code, stdout, _ = resmoe("plan", tiny_mixtral, *given, "--out", tmp_path / "other.yaml")
    assert (code, stdout) == (2, "")
    monkeypatch.setattr("compress_tools.planner.planner.read_layer", None)
    assert resmoe("plan", tiny_mixtral, *given)[0] == 0
