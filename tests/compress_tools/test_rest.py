"""`--rest-bits 8` the whole way: what is coded and what stays, sizes, restore, verify, plans, slices, transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.models.tiny_models import load_model, save_tiny_model
from compress_tools import register_with_transformers
from compress_tools.cli.request import read_request
from compress_tools.config import CompressionConfig, make_config
from compress_tools.errors import CheckpointError, ConfigError, FormatError, NumericalError
from compress_tools.format.rest import decode_rows, encode_rows, row_names
from compress_tools.output.model_card import command_line
from compress_tools.output.outline import make_outline
from compress_tools.output.target import make_target
from compress_tools.pipeline import compress, compress_slice
from compress_tools.planner.budget import plan_for_budget
from compress_tools.planner.config import make_planner_config
from compress_tools.planner.plan_file import parse_plan
from compress_tools.slices.merge import merge
from compress_tools.slices.slices import make_slice
from compress_tools.source.source_reader import SourceReader
from compress_tools.stored.checkpoint import ResMoECheckpoint
from compress_tools.stored.inspection import inspect
from compress_tools.stored.restore import restore
from compress_tools.stored.verify import verification
from tests.compress_tools.hf.test_transformers_loader import logits
from tests.compress_tools.stored.edits import forget_digests

register_with_transformers()
# Experts in codes as good as exact, so that a run takes no time.
QUICK: dict[str, Any] = {"method": "quantize", "bits": 8, "center": "none", "workers": 1}
CODED = make_config(**QUICK, rest_bits=8)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def edited(source: Path, target: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy with one tensor changed."""
    shutil.copytree(source, target)
    (file,) = (file for file in target.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def compressed(tiny_mixtral_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rest") / "small"
    compress(tiny_mixtral_bf16, path, CODED)
    return path


# By family: what is coded, layers left out of the names, and names that might look like it and stay.
FAMILIES = {
    "mixtral": (
        {"embed_tokens", "lm_head", *(f"self_attn.{name}_proj" for name in "qkvo")},
        {"norm", "input_layernorm", "block_sparse_moe.gate"},
    ),
    "qwen2_moe": (
        {"embed_tokens", "lm_head", *(f"self_attn.{name}_proj" for name in "qkvo")}
        | {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")},
        {"mlp.gate", "mlp.shared_expert_gate"},
    ),
    "deepseek_v3": (
        {"embed_tokens", "lm_head", *(f"self_attn.{name}" for name in ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj"))}
        | {"self_attn.q_proj"}
        | {f"{where}.{name}_proj" for where in ("mlp", "mlp.shared_experts") for name in ("gate", "up", "down")},
        {"mlp.gate", "self_attn.kv_a_layernorm"},
    ),
    "jamba": (
        {"embed_tokens", "lm_head", "mamba.in_proj", "mamba.out_proj", *(f"self_attn.{name}_proj" for name in "qkvo")}
        | {f"feed_forward.{name}_proj" for name in ("gate", "up", "down")},
        {"mamba.x_proj", "mamba.dt_proj", "mamba.conv1d", "feed_forward.router"},
    ),
    # vLLM changes q and k as it loads them, and v stands in one matrix with them.
    "llama4": (
        {"embed_tokens", "self_attn.o_proj"}
        | {f"feed_forward.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
        | {f"feed_forward.{name}_proj" for name in ("gate", "up", "down")},
        {"lm_head", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "feed_forward.router"},
    ),
    "deepseek_v32": (
        {"embed_tokens", "lm_head", "self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa"}
        | {"self_attn.kv_b_proj", "self_attn.o_proj"}
        | {f"{where}.{name}_proj" for where in ("mlp", "mlp.shared_experts") for name in ("gate", "up", "down")},
        {"mlp.gate", "self_attn.indexer.wk", "self_attn.indexer.wq_b", "self_attn.indexer.weights_proj"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_coded_and_what_stays(family: str, tmp_path: Path) -> None:
    """By name; what is not coded is bit for bit the source's."""
    source = save_tiny_model(family, tmp_path / "source", torch.float32)
    target = make_target(SourceReader(source), CODED)
    assert target.fmt.rest is not None
    assert target.fmt.format_version == 3

    def kind(name: str) -> str:
        parts = name.removeprefix("language_model.").removeprefix("model.").removesuffix(".weight").split(".")
        return ".".join(parts[2:] if parts[0] == "layers" else parts)

    coded, exact = FAMILIES[family]
    assert {kind(name) for name in target.fmt.rest.tensors} == coded
    stored = {kind(name) for shard in target.shards for name in shard.tensors if name.endswith(".weight")}
    assert exact <= stored
    assert not stored & coded


def test_bytes_on_disk_are_those_of_the_plan(tiny_mixtral_bf16: Path, compressed: Path) -> None:
    target = make_target(SourceReader(tiny_mixtral_bf16), CODED)
    report = json.loads((compressed / "resmoe_report.json").read_text())
    stored = sum(tensor.nbytes for tensor in tensors_of(compressed).values())
    summary = target.summary()
    assert stored == summary["total_bytes"]["after"] == target.expert_bytes_after + target.other_bytes_after
    assert summary["other_bytes"] == {
        "before": target.other_bytes,
        "after": target.other_bytes_after,
        "ratio": target.other_bytes_after / target.other_bytes,
    }
    assert report["other_bytes_after"] == target.other_bytes_after < 0.6 * report["other_bytes"]
    assert report["total_bytes_ratio"] == summary["total_bytes"]["ratio"]
    index = json.loads((compressed / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == stored
    card = (compressed / "README.md").read_text()
    assert "stored in 8-bit codes by row" in card
    assert f"| everything else | {target.other_bytes} | {target.other_bytes_after} |" in card
    found = inspect(compressed)
    assert found.other_bytes == target.other_bytes_after
    assert found.rest is not None
    assert found.rest.matrices == len(target.fmt.rest_tensors)
    assert found.rest.bytes_disk < 0.55 * found.rest.bytes_dense


def test_without_the_option_nothing_changes(tiny_mixtral_bf16: Path) -> None:
    plain, asked = make_config(**QUICK), make_config(**QUICK, rest_bits=16)
    assert plain.recipe() == asked.recipe()
    assert "rest_bits" not in plain.recipe()
    target = make_target(SourceReader(tiny_mixtral_bf16), asked)
    assert "rest" not in target.fmt.model_dump(mode="json")
    assert "other_bytes" not in target.summary()
    assert CODED.recipe()["rest_bits"] == 8
    assert CompressionConfig(**CODED.recipe(), workers=1) == CODED


def test_restored_weights_are_the_codes_meaning(tiny_mixtral_bf16: Path, compressed: Path, tmp_path: Path) -> None:
    written = restore(compressed, tmp_path / "dense")
    source, dense = tensors_of(tiny_mixtral_bf16), tensors_of(tmp_path / "dense")
    assert set(dense) == set(source)
    assert written == sum(tensor.nbytes for tensor in dense.values())
    coded = ResMoECheckpoint(compressed).fmt.rest_tensors
    for name, tensor in source.items():
        if name in coded:
            assert torch.equal(dense[name], decode_rows(*encode_rows(tensor), torch.bfloat16))
            assert not torch.equal(dense[name], tensor)
        elif ".experts." not in name:
            assert torch.equal(dense[name], tensor)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config


def test_verify_recomputes_the_rests_error(tiny_mixtral_bf16: Path, compressed: Path) -> None:
    alone, found = verification(compressed), verification(compressed, tiny_mixtral_bf16)
    source = tensors_of(tiny_mixtral_bf16)
    names = ResMoECheckpoint(compressed).fmt.rest_tensors
    error = sum(
        (decode_rows(*encode_rows(source[name]), torch.float32) - source[name]).double().square().sum()
        for name in names
    )
    energy = sum(source[name].double().square().sum() for name in names)
    assert alone.rest is not None
    assert alone.rest.relative_error is None
    assert found.rest is not None
    assert found.rest.relative_error == pytest.approx(float(error / energy), rel=1e-6)
    assert found.rest.relative_error < 1e-4
    assert found.census is not None
    assert found.rest.matrices == found.census.coded == len(names)


@pytest.mark.parametrize("change", [1, -128])
def test_verify_finds_changed_codes(change: int, tiny_mixtral_bf16: Path, compressed: Path, tmp_path: Path) -> None:
    """A code that is off by one is within no value's half step; what the format forbids is found without a source."""
    codes, _ = row_names("model.layers.1.self_attn.o_proj.weight")
    path = edited(compressed, tmp_path / "changed", codes, lambda tensor: _changed(tensor, change))
    forget_digests(path)
    report = json.loads((path / "resmoe_report.json").read_text())
    (path / "resmoe_report.json").write_text(json.dumps({**report, "shards": {}}))
    if change == 1:
        verification(path)
        with pytest.raises(FormatError, match=r"'model.layers.1.self_attn.o_proj.weight' in codes differs from"):
            verification(path, tiny_mixtral_bf16)
    else:
        with pytest.raises(FormatError, match="holds the code -128"):
            verification(path)


def _changed(codes: torch.Tensor, change: int) -> torch.Tensor:
    codes = codes.clone()
    codes[3, 5] = change if change < -127 else codes[3, 5] + (change if codes[3, 5] < 127 else -change)
    return codes


def test_values_that_are_not_finite_are_refused(tiny_olmoe: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    broken = edited(tiny_olmoe, tmp_path / "source", name, lambda t: t.index_fill(0, torch.tensor([1]), torch.inf))
    with pytest.raises(NumericalError, match=f"{name}.* holds NaN or Inf, which codes can't hold; --rest-bits 16"):
        compress(broken, tmp_path / "small", CODED)


def test_other_dtypes_than_the_experts_stay(tiny_mixtral_bf16: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    mixed = edited(tiny_mixtral_bf16, tmp_path / "source", name, lambda tensor: tensor.float())
    assert name not in make_target(SourceReader(mixed), CODED).fmt.rest_tensors


def test_nothing_to_code_is_said(tmp_path: Path) -> None:
    source = save_tiny_model("switch_transformers", tmp_path / "source", torch.float32)
    with pytest.raises(ConfigError, match=r"--rest-bits 8: .* has no attention, dense layers or embedding in float32"):
        make_target(SourceReader(source), make_config(**QUICK, rest_bits=8))


def test_a_tied_embedding_is_coded_once(tmp_path: Path) -> None:
    source = save_tiny_model("qwen3_moe", tmp_path / "source", torch.float32, tie_word_embeddings=True)
    fmt = make_target(SourceReader(source), CODED).fmt
    assert "model.embed_tokens.weight" in fmt.rest_tensors
    assert "lm_head.weight" not in fmt.rest_tensors


def test_slices_make_what_one_run_makes(tiny_mixtral_bf16: Path, compressed: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        compress_slice(tiny_mixtral_bf16, tmp_path / "small", CODED, make_slice(f"{number}/2"))
    merge(tmp_path / "small", ())
    first, second = tensors_of(compressed), tensors_of(tmp_path / "small")
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_size_counts_the_rest_in_codes(tiny_mixtral_bf16: Path, tmp_path: Path) -> None:
    """The size asked for is above what the rest takes in codes, and below what it takes as it is."""
    plain = make_target(SourceReader(tiny_mixtral_bf16), make_config(**QUICK))
    asked = plain.other_bytes + 200 * sum(len(shard.tensors) for shard in plain.shards)
    budget = make_planner_config(target_size=f"{asked}B", coders="quantize,trellis", measure_rows=16)
    with pytest.raises(ConfigError, match=r"all but the experts alone takes .* \(--rest-bits 8 halves most of it\)"):
        plan_for_budget(tiny_mixtral_bf16, make_config(center="none", workers=1), budget)
    config = make_config(center="none", workers=1, rest_bits=8)
    plan = plan_for_budget(tiny_mixtral_bf16, config, budget)
    assert plan.rest_bits == 8
    assert "\nrest_bits: 8\n" in plan.text
    compress(tiny_mixtral_bf16, tmp_path / "small", config, planned=parse_plan(plan.text, "plan"))
    assert sum(file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors")) <= asked
    assert ResMoECheckpoint(tmp_path / "small").fmt.rest is not None


def test_the_rest_of_a_plan_is_the_command_lines_or_the_plans(tiny_mixtral_bf16: Path, tmp_path: Path) -> None:
    layer = "{center: [], residual: [{method: quantized, projections: [gate_proj, up_proj, down_proj], bits: 8}]}"
    text = "version: 1\ncenter: none\nmax_iterations: 25\ntolerance: 0.0001\nseed: 0\n"
    layers = f"layers:\n  0: {layer}\n  1: dense\n  2: dense\n"
    (tmp_path / "plain.yaml").write_text(text + layers)
    (tmp_path / "coded.yaml").write_text(text + "rest_bits: 8\n" + layers)

    def bits(given: dict[str, Any], plan: str) -> int:
        planned = read_request(given, str(tmp_path / plan)).planned
        assert planned is not None
        return planned.rest_bits

    assert [bits({}, "plain.yaml"), bits({}, "coded.yaml")] == [16, 8]
    assert [bits({"rest_bits": 8}, "plain.yaml"), bits({"rest_bits": 16}, "coded.yaml")] == [8, 16]
    planned = read_request({"rest_bits": 8}, str(tmp_path / "plain.yaml")).planned
    assert planned is not None
    compress(tiny_mixtral_bf16, tmp_path / "small", make_config(workers=1), planned=planned)
    assert ResMoECheckpoint(tmp_path / "small").fmt.rest is not None
    assert "--plan resmoe_plan.yaml --rest-bits 8" in (tmp_path / "small" / "README.md").read_text()
    with pytest.raises(ConfigError, match="rest_bits"):
        parse_plan(text + "rest_bits: 4\n" + layers, "plan")


def test_the_cards_command_has_the_option(tiny_mixtral_bf16: Path) -> None:
    target = make_target(SourceReader(tiny_mixtral_bf16), CODED)
    outline = make_outline(str(tiny_mixtral_bf16), CODED.recipe(), target)
    assert "--rest-bits 8" in command_line(outline, "small")


# One each of: plain names; names that transformers changes; matrices that it joins; a tied output layer; a hybrid.
@pytest.mark.parametrize(
    "family", ["mixtral", "deepseek_v3", "minimax_m3_vl", "lfm2_moe", "gemma4", "granitemoehybrid"]
)
def test_transformers_loads_it_as_its_restored_twin(family: str, tmp_path: Path) -> None:
    source = save_tiny_model(family, tmp_path / "source", torch.float32)
    compress(source, tmp_path / "small", CODED)
    restore(tmp_path / "small", tmp_path / "dense")
    expected = logits(load_model(tmp_path / "dense"))
    assert (expected - logits(load_model(source))).abs().max() > 1e-3, "compression changed nothing to compare"
    torch.testing.assert_close(logits(load_model(tmp_path / "small")), expected, rtol=1e-4, atol=1e-5)


def test_transformers_refuses_matrices_that_it_has_no_place_for(tiny_olmoe: Path, tmp_path: Path) -> None:
    compress(tiny_olmoe, tmp_path / "small", CODED)
    codes, scales = row_names("model.layers.0.self_attn.q_proj.weight")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    config["quantization_config"]["rest"]["tensors"].append("model.layers.0.self_attn.x_proj.weight")
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    (file,) = (file for file in (tmp_path / "small").glob("*.safetensors") if codes in load_file(file))
    tensors = load_file(file)
    for name in (codes, scales):
        tensors[name.replace("q_proj", "x_proj")] = tensors[name].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {name.replace("q_proj", "x_proj"): file.name for name in (codes, scales)}
    (tmp_path / "small" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"1 of .* matrices in 8-bit codes have no place"):
        load_model(tmp_path / "small")
