"""Every tensor and file of a source is accounted for: `verify --against` finds what is missing, added or changed."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compress_tools
from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.config import make_config
from compress_tools.errors import CheckpointError, FormatError, NumericalError
from compress_tools.format.finite import ALLOW_VARIABLE
from compress_tools.format.loading_guard import GUARD_KEY
from compress_tools.pipeline import compress
from compress_tools.progress.listener import Silent
from compress_tools.source.reader import INDEX_NAME
from compress_tools.source.source_reader import SourceReader
from compress_tools.stored.census import Census
from compress_tools.stored.verify import verification, verify
from tests.compress_tools.stored.edits import forget_digests
from tests.compress_tools.test_pipeline import logits, rewritten

QUICK = make_config(center="mean", workers=1)
FILES = {"tokenizer.json": "{}", "README.md": "card", "code/modeling.py": "", "old.bin": "x"}


class Listener(Silent):
    """Remembers what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def source(tiny_olmoe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With files of every kind; 2 layers, 8 experts."""
    path = tmp_path_factory.mktemp("census") / "source"
    shutil.copytree(tiny_olmoe, path)
    for name, content in FILES.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(content)
    return path


@pytest.fixture(scope="module")
def compressed(source: Path) -> Path:
    compress(source, source.with_name("small"), make_config(center="mean", workers=1, layers="1"))
    return source.with_name("small")


@pytest.fixture
def small(compressed: Path, tmp_path: Path) -> Path:
    return forget_digests(shutil.copytree(compressed, tmp_path / "small"))


def test_everything_is_counted(source: Path, compressed: Path) -> None:
    tensors = len(load_file(source / "model.safetensors"))
    plain = len(SourceReader(source).other_files())
    assert verification(compressed, source).census == Census(3 * 8, tensors - 3 * 8, 0, plain, 1)
    assert verification(compressed).census is None
    assert {"tokenizer.json", "code/modeling.py"} <= set(SourceReader(source).files())


def edit_json(name: str, change: Callable[[dict[str, object]], object]) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        content = json.loads((path / name).read_text())
        change(content)
        (path / name).write_text(json.dumps(content))

    return edit


def edit_copied(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Of the tensors that are copied; with a report that knows no checksum, as anyone could make it."""

    def edit(path: Path) -> None:
        file = path / "model-00001-of-00002.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        edit_json("resmoe_report.json", lambda report: report.update(shards={}))(path)
        index = {name: file.name for file in path.glob("*.safetensors") for name in load_file(file)}
        edit_json(INDEX_NAME, lambda content: content.update(weight_map=index))(path)

    return edit


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("breach", "sentence"),
    [
        (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json is missing, a file of"),
        (lambda path: (path / "tokenizer.json").write_text("{ }"), "tokenizer.json differs from"),
        (lambda path: (path / "code/modeling.py").write_text("x"), "code/modeling.py differs from"),
        (lambda path: (path / "SOURCE_README.md").unlink(), "SOURCE_README.md is missing"),
        (lambda path: (path / "README.md").unlink(), "README.md, which was written with it, is missing"),
        (lambda path: (path / "resmoe_recipe.json").unlink(), "resmoe_recipe.json, which was written with it"),
        (lambda path: (path / "notes.txt").touch(), "notes.txt is no file of"),
        (lambda path: (path / "more.safetensors").touch(), "more.safetensors is no file of"),
        (edit_json("resmoe_report.json", lambda report: report.pop("left_out")), "'old.bin' of .* is left out"),
        (edit_json("config.json", lambda config: config.update(rope_theta=5)), "config.json: rope_theta is 5; in"),
        (edit_json("config.json", lambda config: config.pop("vocab_size")), "vocab_size is 'nothing'; in .* it is 128"),
        (edit_json("config.json", lambda config: config.update(extra=1)), "extra is 1; in .* it is 'nothing'"),
        (edit_json("config.json", lambda config: config.pop(GUARD_KEY)), f"config.json has no {GUARD_KEY}"),
        (edit_json(INDEX_NAME, lambda index: index["weight_map"].pop(NORM)), f"not in {INDEX_NAME}, first '{NORM}'"),
        (edit_json(INDEX_NAME, lambda index: index["weight_map"].update({NORM: "model-00002-of-00002.safetensors"})),
         "another shard than"),
        (lambda path: (path / INDEX_NAME).unlink(), f"there is no {INDEX_NAME}"),
        (edit_copied(lambda tensors: tensors.update(extra=torch.zeros(1))), "'extra' is no tensor of"),
        (edit_copied(lambda tensors: tensors.pop("model.layers.0.mlp.experts.3.up_proj.weight")), "up_proj.weight"),
        (edit_copied(lambda tensors: tensors[NORM].neg_()), f"'{NORM}' differs from .*; not made from it"),
        (edit_copied(lambda tensors: tensors.update({NORM: tensors[NORM].double()})), f"'{NORM}' differs from"),
        (edit_copied(lambda tensors: tensors.update({NORM: tensors[NORM][None]})), f"'{NORM}' differs from"),
    ],
)  # fmt: skip
def test_what_differs_is_found(
    breach: Callable[[Path], object], sentence: str, small: Path, source: Path, tmp_path: Path
) -> None:
    breach(small)
    with pytest.raises(FormatError, match=sentence):
        verify(small, source)


def test_what_a_source_has_more_is_found(compressed: Path, source: Path, tmp_path: Path) -> None:
    more = shutil.copytree(source, tmp_path / "source")
    (more / "vocab.txt").touch()
    with pytest.raises(FormatError, match=r"vocab\.txt is missing"):
        verify(compressed, more)
    (more / "vocab.txt").rename(more / "model.gguf.bin")
    with pytest.raises(FormatError, match=r"'model.gguf.bin' of .* is left out .*, and the report does not say so"):
        verify(compressed, more)


def test_tensors_that_the_index_leaves_out_come_through(tiny_mixtral: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_mixtral, tmp_path / "source")
    index = json.loads((source / INDEX_NAME).read_text())
    lost = [name for name in index["weight_map"] if ".experts.1." in name]
    assert len(lost) == 9
    for name in lost:
        del index["weight_map"][name]
    (source / INDEX_NAME).write_text(json.dumps(index))
    listener = Listener()
    found = compress(source, tmp_path / "small", QUICK, progress=listener)
    expected = compress(tiny_mixtral, tmp_path / "other", QUICK)
    assert found.shards == expected.shards
    assert any(f"{len(lost)} tensors of the shards are not in {INDEX_NAME}" in text for text in listener.said)
    verify(tmp_path / "small", source)
    for name in [name for name in index["weight_map"] if "layers.1." in name]:
        del index["weight_map"][name]
    (source / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"does not name model-0000[3-5]-of-00007.safetensors, but others of"):
        compress(source, tmp_path / "again", QUICK)
    (source / INDEX_NAME).unlink()
    verify(tmp_path / "small", source)


def test_names_that_can_not_stand_in_the_output(tiny_olmoe: Path, tiny_mixtral_bf16: Path, tmp_path: Path) -> None:
    odd = rewritten(tiny_olmoe, tmp_path / "odd", {"model.resmoe_values": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="resmoe_values' is named as compressed tensors are"):
        compress(odd, tmp_path / "small", QUICK)
    # As a converter names them, and one router under both names.
    shutil.copytree(tiny_mixtral_bf16, tmp_path / "twice")
    tensors = load_file(tiny_mixtral_bf16 / "model.safetensors")
    renamed = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in tensors.items()}
    for theirs, ours in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        renamed = {name.replace(f".{theirs}.", f".{ours}."): tensor for name, tensor in renamed.items()}
    save_file(renamed, tmp_path / "twice/model.safetensors")
    compress(tmp_path / "twice", tmp_path / "small", QUICK)
    verify(tmp_path / "small", tmp_path / "twice")
    router = "model.layers.0.block_sparse_moe.gate.weight"
    routers = {name: tensor.clone() for name, tensor in tensors.items() if ".block_sparse_moe.gate." in name}
    save_file(renamed | routers, tmp_path / "twice/model.safetensors")
    with pytest.raises(CheckpointError, match=rf"'{router}' and .*mlp.gate.weight' are both '{router}' in the names"):
        compress(tmp_path / "twice", tmp_path / "small", QUICK, overwrite=True)


@pytest.mark.parametrize("layer", ["0", "1", "all"])
def test_experts_in_several_dtypes(layer: str, tiny_olmoe: Path, tmp_path: Path) -> None:
    """Layer 1's are in bf16 but for one in fp16, layer 0's in fp32: the output holds all of them exactly."""
    tensors = load_file(tiny_olmoe / "model.safetensors")
    changed = {name: tensor.bfloat16() for name, tensor in tensors.items() if ".1.mlp.experts." in name}
    changed |= {name: tensors[name].half() for name in changed if ".experts.3.down_proj" in name}
    assert len({tensor.dtype for tensor in changed.values()}) == 2
    source = rewritten(tiny_olmoe, tmp_path / "source", changed)
    exact = rewritten(tiny_olmoe, tmp_path / "exact", {name: tensor.float() for name, tensor in changed.items()})
    listener = Listener()
    config = make_config(center="mean", workers=1, layers=layer)
    found = compress(source, tmp_path / "small", config, progress=listener)
    expected = compress(exact, tmp_path / "other", config)
    made = {"0": {2}, "1": {2}, "all": {2, 3}}[layer]
    shards = [name for name in found.shards if int(name[6:11]) in made]
    assert len(shards) == len(made)
    assert [found.shards[name] for name in shards] == [expected.shards[name] for name in shards]
    assert [own.relative_error for own in found.layers] == [own.relative_error for own in expected.layers]
    assert sum(own.bytes_before for own in found.layers) <= found.expert_bytes_before
    said = [text for text in listener.said if "experts are stored in" in text]
    assert len(said) == (layer != "0")
    assert all("BF16 (first model.layers.1" in text and text.endswith("in float32") for text in said)
    verify(tmp_path / "small", source)


def test_experts_of_no_known_dtype(tiny_olmoe: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    tensors = load_file(tiny_olmoe / "model.safetensors")
    source = rewritten(tiny_olmoe, tmp_path / "source", {name: tensors[name].double()})
    with pytest.raises(CheckpointError, match=rf"stored as F64, first '{name}'; expected .* leave their layers out"):
        compress(source, tmp_path / "small", QUICK)
    compress(source, tmp_path / "small", make_config(center="mean", layers="0"))
    verify(tmp_path / "small", source)


def test_a_tied_output_layer_is_written_out_where_vllm_never_ties(tmp_path: Path) -> None:
    source = save_tiny_model("olmoe", tmp_path / "source", torch.float32, tie_word_embeddings=True)
    assert not any("lm_head" in name for name in load_file(source / "model.safetensors"))
    listener = Listener()
    compress(source, tmp_path / "small", make_config(retain_ratio=1.0), progress=listener)
    assert (
        sum("lm_head.weight is written out, equal to model.embed_tokens.weight" in text for text in listener.said) == 1
    )
    tensors = load_file(tmp_path / "small/model-00001-of-00003.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    census = verification(tmp_path / "small", source).census
    assert census is not None
    assert census.written_out == 1
    compress_tools.register_with_transformers()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    torch.testing.assert_close(logits(tmp_path / "small"), logits(source), rtol=1e-3, atol=1e-4)


def test_a_tied_output_layer_stays_tied_where_vllm_ties(tmp_path: Path) -> None:
    source = save_tiny_model("qwen3_moe", tmp_path / "source", torch.float32, tie_word_embeddings=True)
    compress(source, tmp_path / "small", QUICK)
    assert not any("lm_head" in name for name in load_file(tmp_path / "small/model-00001-of-00003.safetensors"))
    census = verification(tmp_path / "small", source).census
    assert census is not None
    assert census.written_out == 0


def test_weights_that_transformers_would_take_elsewhere(tiny_olmoe: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_olmoe, tmp_path / "source")
    edit_json("config.json", lambda config: config.update({GUARD_KEY: "other.safetensors"}))(source)
    with pytest.raises(CheckpointError, match=f"{GUARD_KEY} is 'other.safetensors': transformers would load that"):
        SourceReader(source)


def test_values_that_are_not_finite_are_copied_and_said_where_that_is_asked_for(
    tiny_olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = load_file(tiny_olmoe / "model.safetensors")[NORM]
    tensor[3] = float("nan")
    source = rewritten(tiny_olmoe, tmp_path / "source", {NORM: tensor})
    listener = Listener()
    sentence = f"'{NORM}' holds NaN or Inf, expected finite numbers; download it again, or set {ALLOW_VARIABLE}=1"
    with pytest.raises(NumericalError, match=re.escape(sentence)):
        compress(source, tmp_path / "small", QUICK, progress=listener)
    assert not (tmp_path / "small").exists()
    monkeypatch.setenv(ALLOW_VARIABLE, "1")
    compress(source, tmp_path / "small", QUICK, progress=listener, overwrite=True)
    assert [text for text in listener.said if "NaN" in text] == [f"{NORM} holds NaN or Inf; it is copied as it is"]
    verify(tmp_path / "small", source)
    monkeypatch.delenv(ALLOW_VARIABLE)
    with pytest.raises(NumericalError, match=re.escape(sentence)):
        verify(tmp_path / "small", source)
