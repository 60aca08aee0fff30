"""Plain tensors that do not fit the model of config.json are named, whatever family it is of."""

import json
import re
import shutil
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from benchmarks.models.tiny_models import NOT_IN_TRANSFORMERS, TINY_CONFIGS, save_tiny_model
from compress_tools import model_class
from compress_tools.config import make_config
from compress_tools.errors import CheckpointError, FormatError
from compress_tools.format.tensors import is_resmoe_name
from compress_tools.pipeline import compress
from compress_tools.source import model_fit
from compress_tools.source.moe_source import open_source
from compress_tools.source.source_reader import SourceReader
from compress_tools.stored.verify import verify
from tests.compress_tools.stored.edits import forget_digests
from tests.compress_tools.test_pipeline import rewritten
from tests.fuzz import loaders

# Sliding windows and biases, compressed attention with tables of experts by token, pictures, state spaces, two stacks.
CHOSEN = ("gpt_oss", "deepseek_v4", "qwen3_vl_moe", "nemotron_h", "switch_transformers", "mixtral")
RESHAPES = ("turn", "flat", "deep", "less", "more", "none", "zero", "scalar")


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every tiny model, compressed."""
    loaders.register()
    top, made = tmp_path_factory.mktemp("families"), {}
    for family in TINY_CONFIGS:
        source = save_tiny_model(family, top / family / "source", torch.bfloat16)
        compress(source, top / family / "small", make_config(method="prune", center="mean", workers=1))
        made[family] = forget_digests(top / family / "small")
    return made


def edited(folder: Path, target: Path, name: str, change: Any) -> Path:
    """A copy of a checkpoint with one tensor changed, or without it."""
    shutil.copytree(folder, target)
    for file in target.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            if name not in opened.keys():  # noqa: SIM118  no iterator
                continue
        tensors = load_file(file)
        tensor = change(tensors.pop(name))
        save_file(tensors if tensor is None else {**tensors, name: tensor.contiguous()}, file, {"format": "pt"})
    index = target / "model.safetensors.index.json"
    if change(torch.zeros(2, 2)) is None and index.exists():
        content = json.loads(index.read_text())
        del content["weight_map"][name]
        index.write_text(json.dumps(content))
    return target


def plain_names(folder: Path) -> list[str]:
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found += [name for name in opened.keys() if not is_resmoe_name(name)]  # noqa: SIM118  no iterator
    return sorted(found)


def reshaped(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    old = list(tensor.shape)
    shape = {
        "turn": old[::-1],
        "flat": [prod(old)],
        "deep": [1, *old],
        "less": [old[0] - 1, *old[1:]],
        "more": [old[0] + 1, *old[1:]],
        "none": [0, *old[1:]],
        "zero": [*old[:-1], 0],
        "scalar": [],
    }[kind]
    return tensor.flatten().repeat(2)[: prod(shape)].reshape(shape)


def test_every_family_fits(families: dict[str, Path]) -> None:
    """And is compared with its class, where transformers has one."""
    assert len(families) == len(TINY_CONFIGS) >= 54
    without = set()
    for family, folder in families.items():
        assert verify(folder), family
        if model_class.empty_model(json.loads((folder / "config.json").read_text())) is None:
            without.add(family)
    assert without == {family for family, why in NOT_IN_TRANSFORMERS.items() if why == "no class for it"}


def test_every_family_fits_by_its_own_layers(families: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model that transformers has no class for."""
    monkeypatch.setattr(model_fit, "empty_model", lambda config: None)
    for folder in families.values():
        assert verify(folder)


@settings(max_examples=60)
@given(family=st.sampled_from(CHOSEN), place=st.floats(0, 1, exclude_max=True), kind=st.sampled_from(RESHAPES))
def test_any_tensor_of_another_shape(
    family: str, place: float, kind: str, families: dict[str, Path], tmp_path: Path
) -> None:
    names = plain_names(families[family])
    name = names[int(place * len(names))]
    target = tmp_path / "x"
    shutil.rmtree(target, ignore_errors=True)
    folder = edited(families[family], target, name, lambda tensor: reshaped(tensor, kind))
    assume(_shape(folder, name) != _shape(families[family], name))
    with pytest.raises(CheckpointError, match=r"has shape \[.*\], expected |does not fit config\.json"):
        verify(folder)


def _shape(folder: Path, name: str) -> list[int]:
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            if name in opened.keys():  # noqa: SIM118  no iterator
                found: list[int] = opened.get_slice(name).get_shape()
                return found
    raise AssertionError(name)


# Found by fuzzing: transformers takes any shape where a model is quantised, and vLLM ends in a bare assertion.
TURNED = {"model.embed_tokens.weight": [64, 128], "lm_head.weight": [64, 128]}


@pytest.mark.parametrize("name", TURNED)
def test_a_turned_embedding_is_refused_by_every_loader(name: str, families: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(families["mixtral"], tmp_path / "x", name, torch.t)
    found, expected = TURNED[name], TURNED[name][::-1]
    with pytest.raises(CheckpointError, match=re.escape(f"{name!r} has shape {found}, expected {expected} as Mixtral")):
        verify(folder)
    with pytest.raises(FormatError, match=re.escape(f"{name!r} holds {found} of floating-point numbers, expected")):
        loaders.by_transformers(folder)
    with pytest.raises(CheckpointError, match=re.escape(f"{name!r} (bfloat16 {found}) does not fit the model that")):
        loaders.by_vllm(folder)


@pytest.mark.parametrize("start", ["model.embed_tokens", "model.norm", "model.layers.1.self_attn.q_proj", "lm_head"])
def test_weights_of_whole_numbers_are_refused_by_every_loader(
    start: str, families: dict[str, Path], tmp_path: Path
) -> None:
    folder = edited(families["mixtral"], tmp_path / "x", f"{start}.weight", lambda tensor: tensor.to(torch.int8))
    for act in (verify, loaders.by_transformers, loaders.by_plugin, loaders.by_vllm):
        with pytest.raises(FormatError, match=rf"'{start}\.weight' is I8 \[.*\], expected floating-point numbers"):
            act(folder)


TABLE = "layers.0.ffn.gate.tid2eid"


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        (TABLE, torch.float32, rf"'{TABLE}' is F32, expected whole numbers as DeepseekV4ForCausalLM has in"),
        (TABLE, torch.float8_e4m3fn, rf"'{TABLE}' is F8_E4M3, expected whole numbers"),
        ("hc_head_scale", torch.int32, r"'hc_head_scale' is I32, expected floating-point numbers as DeepseekV4"),
    ],
)
def test_tables_and_numbers_are_told_apart(
    name: str, dtype: torch.dtype, expected: str, families: dict[str, Path], tmp_path: Path
) -> None:
    folder = edited(families["deepseek_v4"], tmp_path / "x", name, lambda tensor: tensor.to(dtype))
    with pytest.raises(CheckpointError, match=expected):
        verify(folder)


def with_config(folder: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def test_another_model_without_experts(families: dict[str, Path], tmp_path: Path) -> None:
    folder = with_config(families["olmoe"], tmp_path / "x", model_type="olmo", architectures=["OlmoForCausalLM"])
    with pytest.raises(CheckpointError, match=r"model_type is 'olmo', and OlmoForCausalLM has no experts; there are"):
        verify(folder)


@pytest.mark.parametrize("changes", [{"num_layers": 10**12}, {"num_decoder_layers": 2**62}])
def test_a_class_of_endless_layers_is_not_built(changes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another tower's, say, which no tensor of the decoder counts."""
    config = {"model_type": "t5", "d_model": 8, "num_heads": 1, "d_kv": 8, "d_ff": 8, "vocab_size": 8}
    assert model_class.empty_model({**config, "num_layers": 2, "num_decoder_layers": 2}) is not None
    monkeypatch.setattr(model_class, "_MOST_MODULES", 500)
    assert model_class.empty_model({**config, "num_layers": 2, **changes}) is None


def test_endless_layers_of_another_tower_are_not_built_by_loaders(families: dict[str, Path], tmp_path: Path) -> None:
    vision = json.loads((families["qwen3_vl_moe"] / "config.json").read_text())["vision_config"]
    folder = with_config(families["qwen3_vl_moe"], tmp_path / "x", vision_config={**vision, "depth": 10**12})
    with pytest.raises(CheckpointError, match=r"x: config\.json counts 1000000000000 as depth, in all there are"):
        AutoModelForImageTextToText.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"x: config\.json counts 1000000000000 as depth, in all there are"):
        verify(folder)


def test_a_config_that_asks_for_more(families: dict[str, Path], tmp_path: Path) -> None:
    """For biases that no tensor fills: transformers would make them up."""
    folder = with_config(families["olmoe"], tmp_path / "x", attention_bias=True)
    with pytest.raises(CheckpointError, match=r"no model\.layers\.0\.self_attn\.k_proj\.bias and \d+ more, as transf"):
        verify(folder)


def test_tensors_without_a_like_that_are_missing(families: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(families["deepseek_v4"], tmp_path / "x", "hc_head_base", lambda tensor: None)
    with pytest.raises(CheckpointError, match=r"incomplete: there is no model\.hc_head\..*base, as transformers calls"):
        verify(folder)


def test_sources_are_held_to_it_and_may_be_let_pass(
    tiny_mixtral_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    tensor = load_file(tiny_mixtral_bf16 / "model.safetensors")[name]
    folder = rewritten(tiny_mixtral_bf16, tmp_path / "source", {name: tensor[:-1].clone()})
    with pytest.raises(CheckpointError, match=rf"safetensors: '{name}' has shape .*; download it again, or set RESMOE"):
        open_source(SourceReader(folder))
    monkeypatch.setenv(model_fit.ALLOW_VARIABLE, "1")
    assert open_source(SourceReader(folder)).layers


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("model.word_embeddings.weight", torch.t, r"\[64, 128\], expected \[128, 64\]"),
        ("model.norm.weight", lambda tensor: tensor[1:], r"\[63\], expected \[64\]"),
        (
            "model.layers.1.attention.dense.weight",
            torch.flatten,
            r"expected \[64, 64\] as 'model\.layers\.0\.attention",
        ),
        ("model.layers.1.mlp.gate.weight", lambda tensor: tensor[:0], "expected no size of 0"),
    ],
)
def test_a_model_that_transformers_has_no_class_for(
    name: str, change: Any, expected: str, families: dict[str, Path], tmp_path: Path
) -> None:
    folder = edited(families["bailing_moe"], tmp_path / "x", name, change)
    with pytest.raises(CheckpointError, match=rf"'{re.escape(name)}' has shape .*{expected}"):
        verify(folder)
