"""A checkpoint directory as strangers leave it: every fault is a sentence that names the file."""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compress_tools.errors import CheckpointError
from compress_tools.source import reader as reader_module
from compress_tools.source.reader import INDEX_NAME, CheckpointReader

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4873\n"


def checkpoint(path: Path) -> Path:
    """Two shards; both hold ``twice``, and the index says which one counts."""
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "x"}')
    save_file({"twice": torch.full((2, 3), 1.0), "a": torch.zeros(2)}, path / "1.safetensors")
    save_file({"twice": torch.full((4,), 2.0), "b": torch.zeros(3)}, path / "2.safetensors")
    weight_map = {"twice": "2.safetensors", "a": "1.safetensors", "b": "2.safetensors"}
    (path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return path


def edit_index(path: Path, **changes: str | None) -> None:
    """Map tensors elsewhere, or (None) leave them out."""
    index = json.loads((path / INDEX_NAME).read_text())
    found = index["weight_map"] | changes
    index["weight_map"] = {name: shard for name, shard in found.items() if shard is not None}
    (path / INDEX_NAME).write_text(json.dumps(index))


def test_the_last_of_two_shards_counts_as_for_every_loader(tmp_path: Path) -> None:
    reader = CheckpointReader(checkpoint(tmp_path / "x"))
    assert reader.names == ["a", "b", "twice"]
    assert reader.shard_of("twice") == "2.safetensors"
    assert reader.get("twice").unique().tolist() == [2]
    assert reader.get_row("twice", 0).unique().tolist() == [2]
    assert (reader.shape("twice"), reader.nbytes("twice")) == ((4,), 16)
    assert reader.remarks == ["1 tensors are in more than one shard, first 'twice'; the one in 2.safetensors counts"]


@pytest.mark.parametrize("said", ["1.safetensors", None])
def test_two_tensors_of_one_name_and_an_index_that_means_the_other(said: str | None, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x")
    edit_index(path, twice=said)
    with pytest.raises(CheckpointError, match=r"1.safetensors and 2.safetensors hold different tensors named 'twice'"):
        CheckpointReader(path)
    # The same bytes twice are one tensor, wherever the index says that it is.
    save_file({"twice": torch.full((4,), 2.0), "a": torch.zeros(2)}, path / "1.safetensors")
    assert CheckpointReader(path).get("twice").tolist() == [2.0] * 4
    save_file({"twice": torch.tensor([2.0, 2.0, 2.0, -2.0]), "a": torch.zeros(2)}, path / "1.safetensors")
    with pytest.raises(CheckpointError, match="hold different tensors named 'twice'"):
        CheckpointReader(path)


def test_tensors_that_the_index_leaves_out_count(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x")
    save_file({"a": torch.ones(2), "c": torch.zeros(1)}, path / "1.safetensors")
    edit_index(path, a=None, c="1.safetensors")
    reader = CheckpointReader(path)
    assert reader.names == ["a", "b", "c", "twice"]
    assert reader.get("a").tolist() == [1, 1]
    (remark,) = reader.remarks
    assert "1 tensors of the shards are not in model.safetensors.index.json, first 'a'" in remark


def test_a_tensor_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x")
    save_file({"a": torch.ones(2)}, path / "1.safetensors")
    edit_index(path, b="1.safetensors")
    reader = CheckpointReader(path)
    assert reader.shard_of("b") == "2.safetensors"
    assert reader.remarks == [
        "1 tensors are in another shard than model.safetensors.index.json says, first 'b' in 2.safetensors"
    ]


def numbered(path: Path, *names: str) -> Path:
    """A checkpoint without an index; each shard holds a tensor of its own."""
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "x"}')
    for position, name in enumerate(names):
        save_file({f"t{position}": torch.full((2,), float(position))}, path / name)
    return path


def test_shards_without_an_index(tmp_path: Path) -> None:
    names = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    path = numbered(tmp_path / "x", *names, "adapter_model.safetensors")
    reader = CheckpointReader(path)
    assert reader.shards == names
    assert [reader.get(name)[0].item() for name in reader.names] == [0, 1, 2]
    assert "the 3 shards' headers say what is in them" in reader.remarks[0]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["model-00001-of-00003", "model-00003-of-00003"], "2 of 3 shards are there, .* shard 2 of 3 is missing"),
        (["model-00001-of-00003", "model-00002-of-00003"], "2 of 3 shards are there, .* shard 3 of 3 is missing"),
        (["model-00000-of-00002", "model-00002-of-00002"], "shard 1 of 2 is missing"),
        (["model-00001-of-999999999"], "1 of 999999999 shards are there"),
        (["model-00001-of-00001", "model-00001-of-00002"], "shards of more than one series"),
        (["model-00001-of-00002", "model-1-of-2"], "shards of more than one series"),
        (["weights", "adapter"], r"no model.safetensors .*found: adapter.safetensors, weights.safetensors"),
        (["model", "model-00001-of-00001"], "transformers would load model.safetensors, vLLM model-00001-of-00001"),
    ],
)
def test_shards_that_are_no_whole_series(names: list[str], sentence: str, tmp_path: Path) -> None:
    path = numbered(tmp_path / "x", *(f"{name}.safetensors" for name in names))
    with pytest.raises(CheckpointError, match=sentence):
        CheckpointReader(path)


def test_a_model_beside_an_index_of_other_files(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x")
    save_file({"a": torch.ones(2)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"transformers would load model.safetensors, vLLM the files that model"):
        CheckpointReader(path)
    (path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert CheckpointReader(path).shards == ["model.safetensors"]


def replace(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def directory(name: str) -> Callable[[Path], object]:
    return lambda path: ((path / name).unlink(), (path / name).mkdir())


def pipe(name: str) -> Callable[[Path], object]:
    return lambda path: ((path / name).unlink(), os.mkfifo(path / name))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (replace("config.json", "{"), r"config.json: is not JSON: Expecting property name"),
        (replace("config.json", ""), r"config.json: is not JSON"),
        (replace("config.json", "[" * 100_000), r"config.json: is not JSON: nested too deeply"),
        (replace("config.json", "[1]"), r"config.json: expected a JSON object, found list"),
        (replace("config.json", b'{"a": "\xff"}'), r"config.json: is not text in UTF-8: byte 7 is 0xff"),
        (replace("config.json", POINTER), r"config.json: is a Git LFS pointer.*run `git lfs pull` in "),
        (replace("config.json", '{"quantization_config": [1]}'), r"quantization_config: expected a JSON object"),
        (replace("config.json", '{"text_config": "x"}'), r"text_config: expected a JSON object"),
        (directory("config.json"), r"config.json: not readable: is a directory"),
        (lambda path: (path / "config.json").unlink(), r"config.json: missing; expected a Hugging Face"),
        (replace(INDEX_NAME, "{}"), r"index.json: no weight_map"),
        (replace(INDEX_NAME, '{"weight_map": []}'), r"index.json: no weight_map"),
        (
            replace(INDEX_NAME, '{"weight_map": {"a": 5}}'),
            r"index.json: 'a': expected a weight file beside it, found 5",
        ),
        (replace(INDEX_NAME, '{"weight_map": {"a": "../x"}}'), r"'a': expected a weight file beside it, found '../x'"),
        (replace(INDEX_NAME, '{"weight_map": {"a": ""}}'), r"'a': expected a weight file beside it, found ''"),
        (replace(INDEX_NAME, '{"weight_map": {"a": ".."}}'), r"'a': expected a weight file beside it, found '..'"),
        (replace(INDEX_NAME, r'{"weight_map": {"a": "\u0000"}}'), r"'a': expected a weight file beside it"),
        (replace(INDEX_NAME, r'{"weight_map": {"a": "\ud800"}}'), r"'a': expected a weight file beside it"),
        (replace(INDEX_NAME, '{"weight_map": {"c": "1.safetensors"}}'), r"1 tensors of .* are not in their shards"),
        (replace(INDEX_NAME, POINTER), r"index.json: is a Git LFS pointer"),
        (directory(INDEX_NAME), r"index.json: not readable: is a directory"),
        (lambda path: (path / INDEX_NAME).unlink(), r"no model.safetensors.index.json and no model.safetensors"),
        (replace("1.safetensors", POINTER), r"1.safetensors: is a Git LFS pointer.*run `git lfs pull` in "),
        (replace("1.safetensors", b""), r"1.safetensors: truncated or corrupt shard"),
        (replace("1.safetensors", b"\xff" * 64), r"1.safetensors: truncated or corrupt shard"),
        (directory("1.safetensors"), r"1.safetensors: is a directory; expected a weight file"),
        (pipe("1.safetensors"), r"1.safetensors: is a pipe or a device; expected a weight file"),
        (lambda path: (path / "1.safetensors").unlink(), r"1.safetensors: shard named by .* is missing"),
    ],
)
def test_faults_are_sentences(change: Callable[[Path], object], sentence: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x")
    change(path)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        CheckpointReader(path)
    assert str(path) in str(caught.value)
    assert "Errno" not in str(caught.value)


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(CheckpointError, match="is a file; expected the directory"):
        CheckpointReader(tmp_path / "x")


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, "1.safetensors"])
def test_a_file_without_permission(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path / "x")

    def refusing(real: Callable[..., object]) -> Callable[..., object]:
        def read(file: Path, *args: object, **options: object) -> object:
            if Path(file).name == name:
                raise PermissionError(13, "Permission denied", str(file))
            return real(file, *args, **options)

        return read

    # Root may read everything, so the refusal is made up.
    monkeypatch.setattr(reader_module, "safe_open", refusing(reader_module.safe_open))
    monkeypatch.setattr(Path, "read_bytes", refusing(Path.read_bytes))
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(path / name))}: not readable: permission denied"):
        CheckpointReader(path)


def test_a_dtype_that_torch_lacks_is_named(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x")
    (path / INDEX_NAME).unlink()
    header = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [8], "data_offsets": [0, 6]}}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(6))
    reader = CheckpointReader(path)
    assert (reader.dtype("a"), reader.shape("a"), reader.nbytes("a")) == ("F6_E2M3", (8,), 6)
    with pytest.raises(CheckpointError, match=r"can't read 'a', F6_E2M3 \[8\]: Dtype not understood"):
        reader.get("a")
    with pytest.raises(CheckpointError, match=r"can't read 'a'\[0\], F6_E2M3"):
        reader.get_row("a", 0)
    with pytest.raises(CheckpointError, match="tensor 'b' is missing"):
        reader.nbytes("b")


def test_a_shard_that_goes_away_later(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x")
    reader = CheckpointReader(path)
    shutil.rmtree(path)
    with pytest.raises(CheckpointError, match=r"1\.safetensors: shard named by .* is missing"):
        reader.get("a")
    with pytest.raises(CheckpointError, match=r"1.safetensors: can't be read: no such file"):
        reader.fingerprint()
