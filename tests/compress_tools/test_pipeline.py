"""Compress, verify, restore: real checkpoints by transformers, equal bytes after a kill, every refusal."""

import json
import shutil
from math import isfinite
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.models.tiny_models import NOT_IN_TRANSFORMERS, TINY_CONFIGS, load_model, save_tiny_model, token_logits
from compress_tools.config import CompressionConfig, make_config
from compress_tools.errors import (
    CheckpointError,
    ConfigError,
    FormatError,
    NumericalError,
    UnsupportedArchitectureError,
)
from compress_tools.format.loading_guard import GUARD_KEY, GUARD_TEXT
from compress_tools.output.staging import Staging
from compress_tools.pipeline import compress
from compress_tools.progress.listener import Silent
from compress_tools.report import TIMINGS_NAME
from compress_tools.source.layer_selection import select_layers
from compress_tools.source.moe_source import open_source
from compress_tools.source.reader import INDEX_NAME, CheckpointReader
from compress_tools.stored.checkpoint import ResMoECheckpoint
from compress_tools.stored.restore import restore
from compress_tools.stored.verify import verify

# Switch is an encoder-decoder: test_transformers_loader.py.
FAMILIES = sorted(set(TINY_CONFIGS) - {"switch_transformers"} - set(NOT_IN_TRANSFORMERS))


def logits(path: Path) -> torch.Tensor:
    tokens = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    return token_logits(load_model(path), tokens)


def contents(path: Path) -> dict[str, bytes]:
    """All files but the timings, which differ from run to run."""
    files = (file for file in path.rglob("*") if file.is_file() and file.name != TIMINGS_NAME)
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["prune", "low-rank"])
def test_keeping_everything_keeps_the_model(family: str, method: str, tmp_path: Path) -> None:
    source = save_tiny_model(family, tmp_path / "source", torch.float32)
    compress(source, tmp_path / "small", make_config(method=method, retain_ratio=1.0))
    verify(tmp_path / "small", source)
    restore(tmp_path / "small", tmp_path / "dense")
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(source), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["prune", "low-rank", "quantize", "trellis"])
@pytest.mark.parametrize("largest", [1e30, 3e38])
def test_weights_too_large_to_be_compressed_are_refused(method: str, largest: float, tmp_path: Path) -> None:
    """Nothing is written whose error is NaN, which no limit would refuse."""
    source = save_tiny_model("mixtral", tmp_path / "source", torch.float32)
    shard = source / "model.safetensors"
    tensors = load_file(shard)
    name = next(name for name in tensors if ".experts." in name)
    tensors[name].view(-1)[3] = largest
    save_file(tensors, shard, {"format": "pt"})
    try:
        report = compress(source, tmp_path / "small", make_config(method=method))
    except (NumericalError, ConfigError):
        assert not (tmp_path / "small").exists()
    else:
        assert isfinite(report.relative_error)
        verify(tmp_path / "small", source)


@pytest.mark.parametrize("family", sorted(NOT_IN_TRANSFORMERS))
@pytest.mark.parametrize("method", ["prune", "low-rank"])
def test_keeping_everything_keeps_each_expert(family: str, method: str, tmp_path: Path) -> None:
    """Of families that no class here can run as they are published."""
    source = save_tiny_model(family, tmp_path / "source", torch.float32)
    compress(source, tmp_path / "small", make_config(method=method, retain_ratio=1.0))
    verify(tmp_path / "small", source)
    restore(tmp_path / "small", tmp_path / "dense")
    before, after = (open_source(CheckpointReader(path)) for path in (source, tmp_path / "dense"))
    assert after.reader.names == before.reader.names
    x = torch.randn(5, before.sizes.hidden_size, generator=torch.Generator().manual_seed(0))
    experts: set[str] = set()
    for layer in before.layers:
        experts |= set(before.expected(layer))
        for number in range(before.sizes.num_experts):
            outputs = [
                torch.nn.functional.silu(x @ own.matrix("gate_proj").T) * (x @ own.up.T) @ own.down.T
                for own in (before.read_expert(layer, number), after.read_expert(layer, number))
            ]
            torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    others = set(before.reader.names) - experts
    assert experts
    assert others
    assert all(torch.equal(before.reader.get(name), after.reader.get(name)) for name in others)


@pytest.mark.parametrize("method", ["prune", "low-rank", "quantize", "low-rank+quantize"])
def test_report_says_what_verify_finds(method: str, tiny_olmoe: Path, tmp_path: Path) -> None:
    more = {"retain_ratio": 0.1} if method == "low-rank+quantize" else {}
    report = compress(tiny_olmoe, tmp_path / "small", make_config(method=method, **more))
    verdicts = verify(tmp_path / "small", tiny_olmoe)
    for layer, verdict in zip(report.layers, verdicts, strict=True):
        assert verdict.relative_error == pytest.approx(layer.relative_error, rel=1e-4)
        assert 0 < layer.relative_error < layer.residual_energy <= 1
    on_disk = sum(file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors"))
    assert 0 <= on_disk - report.expert_bytes_after - report.other_bytes < 100_000  # safetensors headers
    saved = json.loads((tmp_path / "small" / "resmoe_report.json").read_text())
    assert saved["expert_bytes_after"] == report.expert_bytes_after


def test_the_papers_order_of_centers(tiny_mixtral: Path, tmp_path: Path) -> None:
    errors = {
        center: compress(tiny_mixtral, tmp_path / center, make_config(center=center)).relative_error
        for center in ("barycenter", "mean", "none")
    }
    assert errors["barycenter"] < errors["mean"] < errors["none"]


def test_other_tensors_and_files_pass_through(tiny_mixtral: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_mixtral, source)
    (source / "tokenizer.json").write_text('{"any": "thing"}')
    (source / "README.md").write_text("the model's own card")
    (source / ".cache").mkdir()
    (source / ".cache" / "junk").write_text("not copied")
    compress(source, tmp_path / "small", make_config(layers="0,2"))
    before, after = CheckpointReader(source), CheckpointReader(tmp_path / "small")
    kept = [name for name in before.names if ".experts." not in name or "layers.1." in name]
    assert set(kept) <= set(after.names)
    for name in kept:
        assert torch.equal(before.get(name), after.get(name))
    assert (tmp_path / "small" / "tokenizer.json").read_text() == '{"any": "thing"}'
    assert (tmp_path / "small" / "SOURCE_README.md").read_text() == "the model's own card"
    assert not (tmp_path / "small" / ".cache").exists()
    assert sorted(ResMoECheckpoint(tmp_path / "small").fmt.layers) == [0, 2]
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    config.pop("quantization_config")
    assert config.pop(GUARD_KEY) == GUARD_TEXT
    assert config == before.config
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "small").glob("*.safetensors")}
    assert modes == {(source / "tokenizer.json").stat().st_mode & 0o777}


@pytest.mark.parametrize("method", ["prune", "low-rank"])
def test_same_bytes_for_any_number_of_workers(method: str, tiny_mixtral: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        compress(tiny_mixtral, tmp_path / str(workers) / "small", make_config(method=method, workers=workers))
    assert contents(tmp_path / "1" / "small") == contents(tmp_path / "3" / "small")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", ["prune", "low-rank", "quantize", "low-rank+quantize"])
def test_a_gpu_makes_as_good_a_checkpoint(method: str, tiny_mixtral: Path, tmp_path: Path) -> None:
    on_cpu = compress(tiny_mixtral, tmp_path / "cpu", make_config(method=method))
    on_gpu = compress(tiny_mixtral, tmp_path / "gpu", make_config(method=method, device="cuda"))
    verify(tmp_path / "gpu", tiny_mixtral)
    for here, there in zip(on_cpu.layers, on_gpu.layers, strict=True):
        assert there.assignment_gap <= 1e-6
        assert there.relative_error == pytest.approx(here.relative_error, rel=1e-3)


def test_overwrite_replaces_what_is_ours_and_nothing_else(tiny_mixtral: Path, tmp_path: Path) -> None:
    target = tmp_path / "small"
    target.mkdir()
    (target / "precious.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="not empty"):
        compress(tiny_mixtral, target, make_config())
    with pytest.raises(CheckpointError, match=r"not an output of resmoe.*precious\.txt"):
        compress(tiny_mixtral, target, make_config(), overwrite=True)
    assert [file.name for file in target.iterdir()] == ["precious.txt"]
    (target / "precious.txt").unlink()
    for config in (make_config(), make_config(center="mean")):
        compress(tiny_mixtral, target, config, overwrite=True)
        assert json.loads((target / "resmoe_recipe.json").read_text())["center"] == config.center
    assert sorted(file.name for file in tmp_path.iterdir()) == ["small"]


def rewritten(source: Path, target: Path, change: dict[str, torch.Tensor | None]) -> Path:
    """A one-shard copy with tensors replaced, or dropped (None)."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        pytest.param(None, CheckpointError, r"not all 8 experts.*experts\.5\.up_proj", id="missing expert"),
        pytest.param(torch.ones(24, 63), CheckpointError, r"\[24, 63\]", id="misshapen"),
        pytest.param(torch.full((24, 64), float("nan")), NumericalError, EXPERT, id="nan"),
        pytest.param(torch.full((24, 64), float("inf")), NumericalError, EXPERT, id="inf"),
        pytest.param(torch.ones(24, 64, dtype=torch.float64), CheckpointError, "F64", id="dtype"),
    ],
)
def test_damaged_experts(tiny_olmoe: Path, tmp_path: Path, tensor: torch.Tensor, error: type, message: str) -> None:
    source = rewritten(tiny_olmoe, tmp_path / "source", {EXPERT: tensor})
    with pytest.raises(error, match=message):
        compress(source, tmp_path / "small", make_config())
    assert not (tmp_path / "small").exists()


def test_index_that_promises_too_much(tiny_mixtral: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_mixtral, tmp_path / "source")
    index = json.loads((tmp_path / "source" / INDEX_NAME).read_text())
    index["weight_map"]["model.extra"] = next(iter(index["weight_map"].values()))
    (tmp_path / "source" / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.extra"):
        compress(tmp_path / "source", tmp_path / "small", make_config())


def edited_config(source: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_models_it_does_not_know(tiny_olmoe: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_olmoe / "model.safetensors")
    renamed = {name.replace(".mlp.experts.", ".mlp.expert_list."): tensor for name, tensor in tensors.items()}
    strange = edited_config(tiny_olmoe, tmp_path / "a", model_type="llama")
    save_file(renamed, strange / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UnsupportedArchitectureError, match=r"'llama'.*expert_list\.N\.down_proj.*mixtral, nemotron_h, olmoe"
    ):
        compress(strange, tmp_path / "small", make_config())
    dense = edited_config(tiny_olmoe, tmp_path / "b", model_type="mixtral", num_local_experts=8)
    save_file({name: tensors[name] for name in tensors if "expert" not in name}, dense / "model.safetensors")
    with pytest.raises(UnsupportedArchitectureError, match="not an MoE checkpoint"):
        compress(dense, tmp_path / "small", make_config())
    without = edited_config(tiny_olmoe, tmp_path / "c", num_experts=None)
    with pytest.raises(UnsupportedArchitectureError, match="num_experts"):
        compress(without, tmp_path / "small", make_config())
    not_json = tmp_path / "e"
    not_json.mkdir()
    (not_json / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        compress(not_json, tmp_path / "small", make_config())
    assert not Staging(tmp_path / "small").path.exists()


class Heard(Silent):
    """Keeps the lines of the log."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_a_family_that_is_not_known_is_compressed_by_its_names(tiny_olmoe: Path, tmp_path: Path) -> None:
    unknown = edited_config(tiny_olmoe, tmp_path / "source", model_type="brand_new_moe", num_experts=None)
    heard = Heard()
    found = compress(unknown, tmp_path / "a", make_config(workers=1), progress=heard)
    assert found.shards == compress(tiny_olmoe, tmp_path / "b", make_config(workers=1)).shards
    (line,) = [line for line in heard.lines if "brand_new_moe" in line]
    assert "no family that this version was tested with" in line
    assert "8 experts of 24 x 64 in 2 layers, named model.layers.{layer}.mlp.experts.{expert}" in line
    verify(tmp_path / "a", unknown)
    restore(tmp_path / "a", tmp_path / "dense")
    assert CheckpointReader(tmp_path / "dense").names == CheckpointReader(unknown).names


@pytest.mark.parametrize(
    ("root", "gate_up", "down"),
    [
        ("model.language_model.", "experts.gate_up_proj", "experts.down_proj"),
        ("model.", "block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    ],
    ids=["in a multimodal model", "as Granite's"],
)
def test_an_unknown_stacked_family_comes_back_as_it_was(
    tiny_olmoe: Path, tmp_path: Path, root: str, gate_up: str, down: str
) -> None:
    reader = CheckpointReader(tiny_olmoe)
    tensors = {name.replace("model.", root, 1): reader.get(name) for name in reader.names if "experts" not in name}
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        experts = [[reader.get(f"{stem}.{e}.{p}_proj.weight") for p in ("gate", "up", "down")] for e in range(8)]
        tensors[f"{root}layers.{layer}.{gate_up}"] = torch.stack([torch.cat(own[:2]) for own in experts])
        tensors[f"{root}layers.{layer}.{down}"] = torch.stack([own[2] for own in experts])
    source = edited_config(tiny_olmoe, tmp_path / "source", model_type="brand_new_moe")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    compress(source, tmp_path / "small", make_config(workers=1, retain_ratio=1.0, center="none"))
    verify(tmp_path / "small", source)
    restore(tmp_path / "small", tmp_path / "dense", progress=(heard := Heard()))
    assert any("see that your loader reports no missing weight" in line for line in heard.lines)
    found = CheckpointReader(tmp_path / "dense")
    assert found.names == sorted(tensors)
    for name, tensor in tensors.items():
        rows = found.get(name)
        # Experts come back with their rows in the stored order, which is the source's without a center.
        assert torch.equal(rows, tensor)


def test_another_familys_names_become_the_familys_own(tiny_mixtral: Path, tmp_path: Path) -> None:
    """As some converters write Mixtral: ``mlp.experts.N.gate_proj``, router ``mlp.gate``."""
    own = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    source = shutil.copytree(tiny_mixtral, tmp_path / "source", ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {}
    for name in (reader := CheckpointReader(tiny_mixtral)).names:
        new = name.replace("block_sparse_moe", "mlp")
        for old, projection in own.items():
            new = new.replace(f".{old}.", f".{projection}.")
        tensors[new] = reader.get(name)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    compress(source, tmp_path / "a", make_config(workers=1))
    compress(tiny_mixtral, tmp_path / "b", make_config(workers=1))
    found, expected = CheckpointReader(tmp_path / "a"), CheckpointReader(tmp_path / "b")
    assert found.names == expected.names
    assert all(torch.equal(found.get(name), expected.get(name)) for name in found.names)


@pytest.mark.parametrize(
    "options",
    [
        {"retain_ratio": 0},
        {"retain_ratio": 1.01},
        {"retain_ratio": -0.25},
        {"retain_ratio": float("nan")},
        {"method": "magic"},
        {"center": "elsewhere"},
        {"workers": 0},
        {"colour": "red"},
    ],
    ids=str,
)
def test_refused_options(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="--" + next(iter(options)).replace("_", "-")):
        make_config(**options)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"bits": 3}, "--bits 3 has no effect with --method prune"),
        ({"method": "low-rank", "value_bits": 8}, "--value-bits 8 has no effect with --method low-rank"),
        ({"method": "quantize", "prune_rows": "equal"}, "--prune-rows equal has no effect with --method quantize"),
        ({"method": "quantize", "retain_ratio": 0.5}, "--retain-ratio 0.5 has no effect with --method quantize"),
        ({"factor_bits": 8}, "--factor-bits 8 has no effect with --method prune"),
        ({"low_rank_form": "per-projection"}, "--low-rank-form per-projection has no effect with --method prune"),
        ({"center": "none", "center_bits": 8}, "--center-bits 8 has no effect with --center none"),
        ({"group_size": 32}, "--group-size 32 has no effect with --method prune, which stores no codes here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_options_without_effect_are_refused(options: dict[str, object], found: str) -> None:
    with pytest.raises(ConfigError, match=f"^{found}$"):
        make_config(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"value_bits": 8, "group_size": 32},
        {"center_bits": 8, "group_size": 0},
        {"method": "low-rank+quantize", "bits": 2, "factor_bits": 8, "retain_ratio": 0.1},
        {"method": "quantize", "bits": 8, "group_size": 64},
    ],
    ids=str,
)
def test_the_recipe_repeats_the_config(options: dict[str, object]) -> None:
    config = make_config(**options)
    assert make_config(**config.recipe()).recipe() == config.recipe()


def test_the_low_rank_share_is_small_beside_codes() -> None:
    assert make_config(method="low-rank").retain_ratio == 0.25
    assert make_config(method="low-rank+quantize").retain_ratio == 0.02


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("all", [1, 2, 3, 5]),
        ("top:2", [3, 5]),
        ("bottom:3", [1, 2, 3]),
        ("1,3-3,5", [1, 3, 5]),
        (" ALL ", [1, 2, 3, 5]),
    ],
)
def test_layer_selection(selection: str, expected: list[int]) -> None:
    assert select_layers(selection, [1, 2, 3, 5]) == expected


@pytest.mark.parametrize("selection", ["", "top:0", "top:5", "middle:1", "0", "1-4", "3-1", "-1", "1,,2", "x"])
def test_refused_layer_selections(selection: str) -> None:
    with pytest.raises(ConfigError, match="--layers"):
        select_layers(selection, [1, 2, 3, 5])


def test_verify_finds_other_weights(tiny_olmoe: Path, tmp_path: Path) -> None:
    compress(tiny_olmoe, tmp_path / "small", CompressionConfig())
    name = "model.norm.weight"
    other = rewritten(tiny_olmoe, tmp_path / "other", {name: torch.zeros(64)})
    with pytest.raises(FormatError, match=name):
        verify(tmp_path / "small", other)
    changed = rewritten(tiny_olmoe, tmp_path / "changed", {EXPERT: torch.ones(24, 64)})
    with pytest.raises(FormatError, match="its report says"):
        verify(tmp_path / "small", changed)


def test_verify_finds_changed_bytes(tiny_olmoe: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    compress(tiny_olmoe, small, make_config(center="mean"))
    verify(small)
    shard = small / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(FormatError, match=f"{shard.name} is not the file that was written"):
        verify(small)


def test_layers_that_are_not_there(tiny_olmoe: Path, tmp_path: Path) -> None:
    source = edited_config(tiny_olmoe, tmp_path / "source", num_hidden_layers=4)
    with pytest.raises(CheckpointError, match=r"there is no layer 2, layer 3; config\.json counts 4"):
        compress(source, tmp_path / "small", make_config())
    compress(tiny_olmoe, tmp_path / "small", make_config(center="mean"))
    with pytest.raises(CheckpointError, match="no layer 2, layer 3"):
        verify(edited_config(tmp_path / "small", tmp_path / "cut", num_hidden_layers=4))


def test_a_tensor_that_other_layers_have(tiny_olmoe: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.gate.weight"
    source = rewritten(tiny_olmoe, tmp_path / "source", {name: None})
    with pytest.raises(CheckpointError, match=f"there is no {name};"):
        compress(source, tmp_path / "small", make_config())


@pytest.mark.parametrize("method", ["prune", "low-rank", "quantize"])
def test_a_layer_of_zeros(method: str, tiny_olmoe: Path, tmp_path: Path) -> None:
    names = load_file(tiny_olmoe / "model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in names.items() if ".1.mlp.experts." in name}
    source = rewritten(tiny_olmoe, tmp_path / "source", zeros)
    report = compress(source, tmp_path / "small", make_config(method=method))
    assert report.layers[1].relative_error == 0
    restore(tmp_path / "small", tmp_path / "dense")
    assert not any(load_file(next((tmp_path / "dense").glob("*-00003-of-*.safetensors")))[name].any() for name in zeros)
