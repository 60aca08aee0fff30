"""A model of the hub is calibrated as the same model in a directory is, streamed or not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress_tools.importance import CalibrationFile
from tests.compress_tools.hub.conftest import NAME, Resmoe
from tests.hub_server.repository import Repository, files_of
from tests.hub_server.server import HubServer


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["fetched", "streamed"])
def test_as_from_a_directory(
    stream: tuple[str, ...], hub: HubServer, trained: tuple[Path, Path], tmp_path: Path, resmoe: Resmoe
) -> None:
    published = hub.repositories[NAME] = Repository()
    published.commit(files_of(trained[0]))
    options = ("--text", trained[0] / "heldout.txt", "--max-tokens", "200")
    assert resmoe("calibrate", trained[0], "--out", tmp_path / "here", *options)[0] == 0
    code, _, err = resmoe("calibrate", NAME, "--out", tmp_path / "fetched", *options, *stream)
    assert code == 0, err
    here, fetched = load_file(tmp_path / "here"), load_file(tmp_path / "fetched")
    assert set(here) == set(fetched)
    for name, tensor in here.items():
        assert torch.equal(fetched[name], tensor)
    assert (
        CalibrationFile(tmp_path / "here").metadata["source"]
        != CalibrationFile(tmp_path / "fetched").metadata["source"]
    )
    small = ("--method", "trellis", "--bits", "2", "--center", "none", "--calibration", tmp_path / "fetched")
    assert resmoe("compress", NAME, tmp_path / "small", *small)[0] == 0
    code, _, err = resmoe("compress", trained[0], tmp_path / "other", *small)
    assert (code, "was made from other weights than this source's" in err) == (4, True)


def test_a_model_that_writes_is_whole(
    hub: HubServer, trained: tuple[Path, Path], tmp_path: Path, resmoe: Resmoe
) -> None:
    published = hub.repositories[NAME] = Repository()
    published.commit(files_of(trained[0]))
    code, _, err = resmoe("calibrate", NAME, "--out", tmp_path / "a", "--self-generated", "62", "--stream")
    assert (code, "leave --stream out" in err) == (2, True)
    code, _, err = resmoe("calibrate", NAME, "--out", tmp_path / "a", "--self-generated", "62")
    assert code == 0, err
