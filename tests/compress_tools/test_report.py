"""Every number of the report, recomputed from the files and the restored experts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from compress_tools.config import make_config
from compress_tools.format.codec import restore_center
from compress_tools.pipeline import compress
from compress_tools.report import CompressionReport, LayerReport
from compress_tools.source.design_matrix import expert_to_rows, rows_to_design
from compress_tools.source.moe_source import open_source
from compress_tools.source.reader import CheckpointReader
from compress_tools.stored.checkpoint import ResMoECheckpoint

EXPERTS, ROWS, HIDDEN = 4, 48, 64


@pytest.fixture(scope="module")
def small(tiny_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 0 and 2 of three, so that compressed and untouched experts are told apart."""
    target = tmp_path_factory.mktemp("report") / "small"
    compress(tiny_mixtral, target, make_config(layers="0,2", method="quantize", bits=3))
    return target


def tensor_bytes(directory: Path) -> dict[str, int]:
    """Bytes of every tensor in the files themselves."""
    found: dict[str, int] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        with safe_open(shard, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  a handle, not a mapping
                found[name] = opened.get_tensor(name).nbytes
    return found


def test_bytes_are_those_of_the_files(small: Path, tiny_mixtral: Path) -> None:
    report = json.loads((small / "resmoe_report.json").read_text())
    before, after = tensor_bytes(tiny_mixtral), tensor_bytes(small)
    experts_before = sum(nbytes for name, nbytes in before.items() if ".experts." in name)
    others = sum(nbytes for name, nbytes in before.items() if ".experts." not in name)
    experts_after = sum(after.values()) - others
    assert report["expert_bytes_before"] == experts_before
    assert report["expert_bytes_after"] == experts_after
    assert report["other_bytes"] == others
    # A third of the experts is as it was: neither ratio is that of the compressed layers alone.
    assert report["expert_bytes_ratio"] == experts_after / experts_before
    assert report["total_bytes_ratio"] == sum(after.values()) / sum(before.values())
    assert len({round(report[key], 3) for key in ("expert_bytes_ratio", "total_bytes_ratio")}) == 2
    for layer in report["layers"]:
        of_layer = f"layers.{layer['layer']}.block_sparse_moe."
        own = sum(nbytes for name, nbytes in before.items() if of_layer in name and ".experts." in name)
        stored = sum(nbytes for name, nbytes in after.items() if of_layer in name and "resmoe" in name)
        assert layer["bytes_before"] == own == experts_before // 3
        assert layer["bytes_after"] == stored
    assert [layer["layer"] for layer in report["layers"]] == [0, 2]


def test_errors_are_those_of_the_restored_experts(small: Path, tiny_mixtral: Path) -> None:
    """Rows are matched anew, each restored one to the nearest of the source: at this rate that is its own."""
    report = json.loads((small / "resmoe_report.json").read_text())
    checkpoint, source = ResMoECheckpoint(small), open_source(CheckpointReader(tiny_mixtral))
    relative = []
    for layer in report["layers"]:
        error = energy = residual = 0.0
        shared = checkpoint.shared(layer["layer"])
        center = rows_to_design(restore_center(checkpoint.fmt.layers[layer["layer"]], shared, HIDDEN)).double()
        for expert in range(EXPERTS):
            original = rows_to_design(expert_to_rows(source.read_expert(layer["layer"], expert))).double()
            restored = rows_to_design(checkpoint.expert(layer["layer"], expert)).double()
            perm = torch.cdist(restored, original).argmin(1)
            assert sorted(perm.tolist()) == list(range(ROWS))
            error += (original[perm] - restored).square().sum().item()
            residual += (original[perm] - center).square().sum().item()
            energy += original.square().sum().item()
        assert layer["approximation_error"] == pytest.approx(error / EXPERTS / ROWS, rel=1e-5)
        assert layer["relative_error"] == pytest.approx(error / energy, rel=1e-5)
        assert layer["residual_energy"] == pytest.approx(residual / energy, rel=1e-5)
        relative.append(error / energy)
    assert report["mean_relative_error"] == pytest.approx(sum(relative) / len(relative), rel=1e-5)


def test_the_mean_is_over_the_compressed_layers() -> None:
    """Two layers of different errors among more that are untouched."""
    layers = [LayerReport(layer, 2.0, error, 0.9, 100, 25, "mean", [1.0], 0.0) for layer, error in ((1, 0.1), (4, 0.4))]
    report = CompressionReport(layers, 500, 350, 50, {}, {})
    assert report.relative_error == pytest.approx(0.25)
    assert report.content()["expert_bytes_ratio"] == 0.7
    assert report.content()["total_bytes_ratio"] == 400 / 550
    assert report.content()["mean_relative_error"] == pytest.approx(0.25)
