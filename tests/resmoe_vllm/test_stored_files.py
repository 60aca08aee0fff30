"""Files of a model that is called by its name on the hub: in its cache's layout, compared before a weight is loaded."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.config import make_config
from compress_tools.errors import FormatError, NumericalError
from compress_tools.pipeline import compress
from resmoe_vllm.config import ResMoEConfig
from resmoe_vllm.stored_files import folder_of, is_whole, watched
from tests.fuzz import loaders
from tests.fuzz.mutants import Shard
from tests.fuzz.seeds import Files, read_files

NAME, COMMIT = "some/model", "0" * 40
CENTER = "model.layers.0.mlp.experts.0.up_proj.resmoe_center"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Files:
    loaders.register()
    folder = tmp_path_factory.mktemp("hub")
    source = save_tiny_model("olmoe", folder / "source", torch.bfloat16)
    compress(source, folder / "small", make_config(center="mean", workers=1))
    return read_files(folder / "small")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(files: Files, cache: Path) -> Path:
    """As huggingface_hub keeps a snapshot: links to blobs, and the commit that a branch is at."""
    top = cache / "models--some--model"
    snapshot = top / "snapshots" / COMMIT
    for folder in (top / "blobs", top / "refs", snapshot):
        folder.mkdir(parents=True)
    (top / "refs" / "main").write_text(COMMIT)
    for number, (name, content) in enumerate(files.items()):
        (top / "blobs" / str(number)).write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def renamed(files: Files, old: str, new: str) -> Files:
    """A tensor under another name, in its file and in the index."""
    made = {}
    for name, content in files.items():
        if name.endswith(".safetensors") and old in (shard := Shard(content)).octets:
            shard.octets = {new if key == old else key: value for key, value in shard.octets.items()}
            shard.header[new] = shard.header.pop(old)
            made[name] = shard.pack()
        else:
            made[name] = content.replace(f'"{old}"'.encode(), f'"{new}"'.encode())
    assert made != files
    return made


def served(files: Files) -> ResMoEConfig:
    return ResMoEConfig.from_config(json.loads(files["config.json"])["quantization_config"])


def read(files: Files, cache: Path) -> list[tuple[str, Tensor]]:
    """All tensors, as vLLM's own loader reads a model of the hub."""
    block = json.loads(files["config.json"])["quantization_config"]
    config: Any = SimpleNamespace(
        model=NAME, revision=None, quantization="resmoe", hf_config=SimpleNamespace(quantization_config=block)
    )
    loader = DefaultModelLoader(LoadConfig(load_format="safetensors", download_dir=str(cache), use_tqdm_on_load=False))
    return list(loader.get_all_weights(config, torch.nn.Module()))


def test_a_good_one(good: Files, cache: Path) -> None:
    snapshot = put(good, cache)
    assert folder_of(NAME, None) == snapshot
    served(good).maybe_update_config(NAME, revision=None)
    names = {name for file, content in good.items() if file.endswith(".safetensors") for name in Shard(content).octets}
    assert {name for name, _ in read(good, cache)} == names


def test_headers_are_compared_before_the_model_is_built(good: Files, cache: Path) -> None:
    files = renamed(good, CENTER, f"{CENTER}_old")
    put(files, cache)
    with pytest.raises(FormatError, match=rf"^{NAME}: layer 0: tensor '{CENTER}' is missing"):
        served(files).maybe_update_config(NAME)


def test_headers_are_compared_before_a_weight_is_loaded(good: Files, cache: Path) -> None:
    files = renamed(good, CENTER, f"{CENTER}_old")
    put(files, cache)
    with pytest.raises(FormatError, match=rf"^{NAME}: layer 0: tensor '{CENTER}' is missing"):
        read(files, cache)


def test_what_is_not_downloaded_yet_is_not_missing(good: Files, cache: Path) -> None:
    """vLLM fetches it after the model is built; then it must be there."""
    shard = next(name for name in good if name.endswith(".safetensors"))
    snapshot = put({name: content for name, content in good.items() if name != shard}, cache)
    assert not is_whole(snapshot)
    served(good).maybe_update_config(NAME)
    # By vLLM, which downloads first.
    with pytest.raises(FileNotFoundError, match=rf"referenced in index but missing: .*{shard}"):
        read(good, cache)


def test_a_name_that_is_nowhere(good: Files, cache: Path) -> None:
    assert folder_of(NAME, None) is None
    assert folder_of("no name at all", None) is None
    served(good).maybe_update_config(NAME)


def test_a_plain_weight_that_is_not_finite(good: Files, cache: Path) -> None:
    file = next(name for name, content in good.items() if b'"model.norm.weight"' in content and name[-1] == "s")
    shard = Shard(good[file])
    shard.octets["model.norm.weight"] = b"\xc0\x7f" + shard.octets["model.norm.weight"][2:]
    files = {**good, file: shard.pack()}
    put(files, cache)
    with pytest.raises(NumericalError, match=rf"^{NAME}: 'model\.norm\.weight' holds NaN or Inf"):
        read(files, cache)


def test_other_models_are_left_alone() -> None:
    tensors = [("a", torch.tensor([float("nan")]))]
    config: Any = SimpleNamespace(model=NAME, quantization="fp8")
    assert list(watched(None, config, tensors)) == tensors
