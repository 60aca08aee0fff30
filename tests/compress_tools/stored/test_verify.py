"""What `verify` refuses, what it lets pass, and that it reads each weight file once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress_tools.config import make_config
from compress_tools.errors import CheckpointError, ConfigError, FormatError, NumericalError
from compress_tools.format.shard_file import SinglePass, file_checksum
from compress_tools.pipeline import compress
from compress_tools.progress.listener import Silent
from compress_tools.report import REPORT_NAME
from compress_tools.source.reader import CheckpointReader
from compress_tools.stored.verify import REPORT_TOLERANCE, verify
from tests.compress_tools.stored.edits import forget_digests
from tests.compress_tools.test_pipeline import rewritten


@pytest.fixture(scope="module")
def compressed(tiny_olmoe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lossy enough that an error can be told from rounding."""
    path = tmp_path_factory.mktemp("verify") / "small"
    compress(tiny_olmoe, path, make_config(method="quantize", bits=3, group_size=0, center="mean"))
    return path


@pytest.fixture
def small(compressed: Path, tmp_path: Path) -> Path:
    return forget_digests(shutil.copytree(compressed, tmp_path / "small"))


def edit_report(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    report = json.loads((path / REPORT_NAME).read_text())
    change(report)
    (path / REPORT_NAME).write_text(json.dumps(report))


def edit_tensors(path: Path, layer: int, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Change a layer's tensors, and give the file's new checksum to the report."""
    number = layer + 2
    file = path / f"model-{number:05d}-of-00003.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    edit_report(path, lambda report: report["shards"].update({file.name: file_checksum(file)}))


def test_values_a_little_larger_are_refused(small: Path, tiny_olmoe: Path) -> None:
    assert [verdict.layer for verdict in verify(small, tiny_olmoe)] == [0, 1]
    edit_tensors(small, 1, lambda name, tensor: tensor * 1.05 if name.endswith("scales") else tensor)
    verify(small)
    with pytest.raises(FormatError, match=r"layer 1: relative error .* its report says"):
        verify(small, tiny_olmoe)


@pytest.mark.parametrize(
    ("factor", "passes"), [(1.0005, True), (0.9995, True), (1.5, True), (0.99, False), (0.5, False)]
)
def test_a_report_may_be_off_by_its_tolerance_alone(factor: float, passes: bool, small: Path, tiny_olmoe: Path) -> None:
    assert REPORT_TOLERANCE == 1e-3
    reported = json.loads((small / REPORT_NAME).read_text())["layers"][0]["relative_error"]
    assert reported > 1e-4
    edit_report(small, lambda report: report["layers"][0].update(relative_error=reported * factor))
    if passes:
        assert verify(small, tiny_olmoe)[0].reported_relative_error == reported * factor
    else:
        with pytest.raises(FormatError, match="layer 0: relative error"):
            verify(small, tiny_olmoe)


def test_each_weight_file_is_read_once(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = SinglePass.__init__

    def counted(self: SinglePass, file: Path) -> None:
        read.append(file.name)
        real(self, file)

    monkeypatch.setattr(SinglePass, "__init__", counted)
    monkeypatch.setattr(CheckpointReader, "get", None)
    monkeypatch.setattr(CheckpointReader, "get_row", None)
    assert [verdict.relative_error for verdict in verify(small)] == [None, None]
    assert read == sorted(file.name for file in small.glob("*.safetensors"))
    assert len(read) == 3


def test_progress_of_files_tensors_and_experts(small: Path, tiny_olmoe: Path) -> None:
    class Recorder(Silent):
        def __init__(self) -> None:
            self.seen: list[object] = []
            self.steps = 0

        def start(self, total: int, unit: str = "shard") -> None:
            self.seen.append((total, unit))

        def stage(self, text: str, total: int | None, layer: int | None = None) -> None:
            self.seen.append((text, layer))

        def step(self) -> None:
            self.steps += 1

        def shard_done(self) -> None:
            self.seen.append("done")

    progress = Recorder()
    verify(small, tiny_olmoe, progress=progress)
    names = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert progress.seen == [
        (3, "file"),
        (f"reading {names[0]}", None),
        "done",
        (f"reading {names[1]}", None),
        ("comparing with the source", 0),
        "done",
        (f"reading {names[2]}", None),
        ("comparing with the source", 1),
        "done",
    ]
    assert progress.steps == sum(len(load_file(small / name)) for name in names) + 2 * 8


def test_what_is_wrong_with_values_and_bytes(small: Path) -> None:
    def spoilt(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.full_like(tensor, float("nan")) if name.endswith("scales") else tensor

    whole = (small / REPORT_NAME).read_bytes()
    edit_tensors(small, 0, spoilt)
    with pytest.raises(NumericalError, match="holds NaN or Inf"):
        verify(small)
    # With the report's own checksum the bytes are what is wrong, and the value follows from it.
    (small / REPORT_NAME).write_bytes(whole)
    with pytest.raises(FormatError, match="is not the file that was written"):
        verify(small)


def test_a_layer_over_two_files_in_any_order(small: Path, tiny_olmoe: Path) -> None:
    expected = verify(small, tiny_olmoe)
    index_file = small / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(small.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    halves = sorted(tensors)[::2], sorted(tensors)[1::2]
    for number, names in enumerate(halves):
        save_file({name: tensors[name] for name in names}, small / f"{number}.safetensors")
    index["weight_map"] = {name: f"{number}.safetensors" for number, names in enumerate(halves) for name in names}
    index_file.write_text(json.dumps(index))
    edit_report(small, lambda report: report.update(shards={}))
    assert verify(small, tiny_olmoe) == expected


@pytest.mark.parametrize("method", ["prune", "quantize"])
def test_a_layer_of_zeros_against_its_source(method: str, tiny_olmoe: Path, tmp_path: Path) -> None:
    names = load_file(tiny_olmoe / "model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in names.items() if ".1.mlp.experts." in name}
    assert zeros
    source = rewritten(tiny_olmoe, tmp_path / "source", zeros)
    compress(source, tmp_path / "small", make_config(method=method))
    assert [verdict.relative_error for verdict in verify(tmp_path / "small", source)][1] == 0


def test_values_where_the_source_has_zeros(tiny_olmoe: Path, small: Path, tmp_path: Path) -> None:
    names = load_file(tiny_olmoe / "model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in names.items() if ".1.mlp.experts." in name}
    with pytest.raises(FormatError, match="layer 1: relative error against the source is inf"):
        verify(small, rewritten(tiny_olmoe, tmp_path / "source", zeros))


def test_against_a_compressed_checkpoint(small: Path) -> None:
    with pytest.raises(ConfigError, match="is a ResMoE checkpoint; give the original that it was made from"):
        verify(small, small)


def test_a_copied_tensor_is_compared_bit_by_bit(small: Path, tiny_olmoe: Path, tmp_path: Path) -> None:
    name = "model.norm.weight"
    tensor = load_file(tiny_olmoe / "model.safetensors")[name]
    for number, other in enumerate((tensor.nextafter(torch.tensor(2.0)), tensor.half(), tensor[None])):
        source = rewritten(tiny_olmoe, tmp_path / str(number), {name: other.contiguous()})
        with pytest.raises(FormatError, match=f"{name}' differs from .*; not made from it"):
            verify(small, source)
    source = rewritten(tiny_olmoe, tmp_path / "more", {"model.extra": tensor.clone()})
    with pytest.raises(FormatError, match=r"'model.extra' of .* is missing"):
        verify(small, source)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "not a report of this version"),
        ('{"layers": [1]}', "not a report of this version"),
        ('{"layers": 3}', "not a report of this version"),
        ('{"layers": [{"layer": 0, "relative_error": NaN}]}', "relative error of layer 0 is nan"),
        ('{"layers": [{"layer": 0, "relative_error": "x"}]}', "relative error of layer 0 is 'x'"),
        ('{"layers": [{"layer": 0, "relative_error": -1}]}', "relative error of layer 0 is -1"),
        ('{"layers": [], "shards": [1]}', "not a report of this version"),
        ('{"layers": [], "shards": {"../x": "00"}}', "'../x': expected a weight file beside it"),
        ('{"layers": [], "shards": {"x": 5}}', "'x': expected a weight file beside it"),
        ('{"layers": [], "shards": {"x.safetensors": "00"}}', "x.safetensors is missing"),
    ],
)
def test_reports_that_are_none(content: str, sentence: str, small: Path) -> None:
    (small / REPORT_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=sentence):
        verify(small)
