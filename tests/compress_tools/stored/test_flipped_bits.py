"""One bit turned round anywhere in what ``verify`` answers for is found, and the file is named."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress_tools.config import make_config
from compress_tools.errors import FormatError, ResMoEError
from compress_tools.format.shard_file import file_checksum, read_header
from compress_tools.output.run_record import CONFIG_KEY, RECORD_KEY, TEXTS_KEY
from compress_tools.pipeline import compress
from compress_tools.source.reader import INDEX_NAME
from compress_tools.stored.verify import verify
from tests.compress_tools.stored.edits import edit_index, forget_digests

BITS = 60
TEXTS = ("config.json", INDEX_NAME, "resmoe_report.json", "resmoe_recipe.json")


@pytest.fixture(scope="module")
def small(tiny_olmoe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("flipped") / "small"
    compress(tiny_olmoe, made, make_config(value_bits=8, center="mean", rest_bits=8))
    return made


def flip(file: Path, position: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def refusal(folder: Path) -> str:
    with pytest.raises(ResMoEError) as caught:
        verify(folder)
    return str(caught.value)


def with_one_file_copied(small: Path, target: Path, name: str) -> Path:
    """Links to the files, and a copy of the one that is to be changed."""
    target.mkdir()
    for file in small.iterdir():
        if file.name == name:
            shutil.copyfile(file, target / name)
        else:
            (target / file.name).hardlink_to(file)
    return target


def test_any_bit_of_any_weight_file(small: Path, tmp_path: Path) -> None:
    """In headers too, where most of what follows is of another name or shape."""
    pick = random.Random(0)
    files = sorted(small.glob("*.safetensors"))
    assert len(files) == 3
    for number in range(2 * BITS):
        file = pick.choice(files)
        folder = with_one_file_copied(small, tmp_path / str(number), file.name)
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        flip(folder / file.name, pick.randrange(header if number % 2 else file.stat().st_size), pick.randrange(8))
        assert file.name in refusal(folder)


@pytest.mark.parametrize("name", TEXTS)
def test_any_bit_of_any_text(name: str, small: Path, tmp_path: Path) -> None:
    """White space and the digests themselves included."""
    pick = random.Random(name)
    size = (small / name).stat().st_size
    for number in range(2 * BITS):
        folder = with_one_file_copied(small, tmp_path / str(number), name)
        flip(folder / name, pick.randrange(size), pick.randrange(8))
        assert name in refusal(folder)


def test_every_bit_of_what_the_index_says_of_itself(small: Path, tmp_path: Path) -> None:
    """From the total to the first tensor's name, and the record's last lines, which hold the digests."""
    folder = with_one_file_copied(small, tmp_path / "small", INDEX_NAME)
    whole = (small / INDEX_NAME).read_bytes()
    places = [*range(whole.index(b"model.")), *range(whole.index(b'"config": "'), len(whole))]
    assert 500 < len(places) < 1500
    for position in places[:: len(places) // 80]:
        for bit in range(8):
            (folder / INDEX_NAME).write_bytes(whole)
            flip(folder / INDEX_NAME, position, bit)
            assert INDEX_NAME in refusal(folder)


def test_a_bit_that_makes_a_tensor_wrong_names_it(small: Path, tmp_path: Path) -> None:
    """A mask that keeps a value more, in a file whose checksum differs, too."""
    folder = shutil.copytree(small, tmp_path / "small")
    file = next(file for file in sorted(folder.glob("*.safetensors")) if any("mask" in n for n in read_header(file)))
    name, stored = next(item for item in read_header(file).items() if item[0].endswith("mask"))
    flip(file, 8 + int.from_bytes(file.read_bytes()[:8], "little") + stored.begin, 0)
    sentence = refusal(folder)
    assert f"{file.name} is not the file that was written" in sentence
    assert "masks keep" in sentence
    assert "layer 0, expert 0" in sentence
    assert name.startswith("model.layers.0.mlp.experts.0.")


def test_a_config_that_was_written_without_a_digest_is_taken(small: Path, tmp_path: Path) -> None:
    """As versions before wrote it."""
    folder = forget_digests(shutil.copytree(small, tmp_path / "small"))
    edit_index(folder, lambda index: index[RECORD_KEY].pop(CONFIG_KEY))
    config = folder / "config.json"
    config.write_text(config.read_text() + " ")
    assert [verdict.layer for verdict in verify(folder)] == [0, 1]
    # Or no record at all.
    edit_index(folder, lambda index: index.pop(RECORD_KEY))
    assert [verdict.layer for verdict in verify(folder)] == [0, 1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda index: index.update(resmoe_ruf=index.pop(RECORD_KEY)), "unknown key 'resmoe_ruf'"),
        (lambda index: index.update({RECORD_KEY: []}), "resmoe_run: expected an object"),
        (lambda index: index[RECORD_KEY].pop("identity"), "resmoe_run: expected an object"),
        (lambda index: index[RECORD_KEY].update(was="00"), "resmoe_run: unknown key 'was'"),
        (lambda index: index.pop("metadata"), "metadata: expected an object with total_size, found None"),
        (lambda index: index["metadata"].update(tot=1), "metadata: unknown key 'tot'"),
        (lambda index: index["metadata"].pop("total_size"), r"total_size is None, its tensors have \d+ bytes"),
        (lambda index: index["metadata"].update(total_size=7), r"total_size is 7, its tensors have \d+ bytes"),
        (lambda index: index["metadata"].update(total_size="7"), r"total_size is '7', its tensors have \d+ bytes"),
    ],
)
def test_what_an_index_without_a_digest_of_its_own_says(
    change: Callable[[dict[str, Any]], object], sentence: str, small: Path, tmp_path: Path
) -> None:
    folder = forget_digests(shutil.copytree(small, tmp_path / "small"))
    assert [verdict.layer for verdict in verify(folder)] == [0, 1]
    edit_index(folder, change)
    with pytest.raises(FormatError, match=sentence):
        verify(folder)


@pytest.mark.parametrize("change", ["source", "sourcf", "layer"])
def test_keys_of_a_report_without_a_digest(change: str, small: Path, tmp_path: Path) -> None:
    folder = forget_digests(shutil.copytree(small, tmp_path / "small"))
    file = folder / "resmoe_report.json"
    report = json.loads(file.read_text())
    (report["layers"][1] if change == "layer" else report)[change if change != "layer" else "lay"] = {}
    file.write_text(json.dumps(report))
    if change == "source":
        assert [verdict.layer for verdict in verify(folder)] == [0, 1]
    else:
        with pytest.raises(FormatError, match=r"resmoe_report\.json.*: unknown key '(sourcf|lay)'"):
            verify(folder)


def test_a_checkpoint_whose_index_another_tool_wrote(small: Path, tmp_path: Path) -> None:
    """In one file, as tools that split and join checkpoints leave it: nothing is known of how it was written."""
    folder, tensors = shutil.copytree(small, tmp_path / "small"), dict[str, torch.Tensor]()
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / "resmoe_report.json").unlink()
    save_file(tensors, folder / "model.safetensors")
    weight_map = dict.fromkeys(tensors, "model.safetensors")
    index = {"metadata": {"total_size": 1, "format": "pt"}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    assert [verdict.layer for verdict in verify(folder)] == [0, 1]


def test_digests_are_of_whole_files(small: Path) -> None:
    record = json.loads((small / INDEX_NAME).read_text())[RECORD_KEY]
    assert set(record[TEXTS_KEY]) == {*TEXTS} - {"config.json"}
    assert record[CONFIG_KEY] == file_checksum(small / "config.json")
    assert all(record[TEXTS_KEY][name] == file_checksum(small / name) for name in TEXTS[2:])
