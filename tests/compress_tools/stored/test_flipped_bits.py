"""One bit turned round in weights or config is found by ``verify``: the file, and the tensor where its values tell."""

import random
import shutil
from pathlib import Path

import pytest

from compress_tools.config import make_config
from compress_tools.errors import ResMoEError
from compress_tools.format.shard_file import read_header
from compress_tools.pipeline import compress
from compress_tools.stored.verify import verify

BITS = 60


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


def test_any_bit_of_any_weight_file(small: Path, tmp_path: Path) -> None:
    """The file is named, by its checksum or as damaged."""
    pick = random.Random(0)
    files = sorted(small.glob("*.safetensors"))
    assert len(files) == 3
    for number in range(BITS):
        file = pick.choice(files)
        folder = shutil.copytree(small, tmp_path / str(number))
        flip(folder / file.name, pick.randrange(file.stat().st_size), pick.randrange(8))
        sentence = refusal(folder)
        assert file.name in sentence or any(name in sentence for name in read_header(file)), sentence


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


def test_any_bit_of_the_config(small: Path, tmp_path: Path) -> None:
    pick = random.Random(1)
    size = (small / "config.json").stat().st_size
    for number in range(BITS):
        folder = shutil.copytree(small, tmp_path / str(number))
        flip(folder / "config.json", pick.randrange(size), pick.randrange(8))
        sentence = refusal(folder)
        assert str(folder) in sentence or "config.json" in sentence


def test_a_config_that_was_written_without_a_digest_is_taken(small: Path, tmp_path: Path) -> None:
    """As versions before wrote it."""
    folder = shutil.copytree(small, tmp_path / "small")
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    assert '"config": "' in text
    index.write_text(text.replace('"config": "', '"was": "'))
    config = folder / "config.json"
    config.write_text(config.read_text() + " ")
    assert [verdict.layer for verdict in verify(folder)] == [0, 1]
