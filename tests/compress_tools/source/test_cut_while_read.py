"""A weight file that is cut while it is read: a sentence, where a mapped file would end the process (SIGBUS)."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.config import make_config
from compress_tools.pipeline import compress

# Runs one command on a checkpoint whose files are cut to a page as soon as the first layer is begun.
CUT = """
import os, sys
from pathlib import Path
from compress_tools.config import make_config
from compress_tools.errors import CheckpointError
from compress_tools.pipeline import compress
from compress_tools.planner.config import make_planner_config
from compress_tools.planner.planner import find_plan
from compress_tools.probe.config import make_probe_config
from compress_tools.probe.probe import probe
from compress_tools.progress.listener import Silent
from compress_tools.source.source_reader import SourceReader
from compress_tools.stored.restore import restore
from compress_tools.stored.verify import verify

command, dense, small, out = sys.argv[1], *map(Path, sys.argv[2:])
QUICK = make_config(center="mean", workers=1)

class Cutting(Silent):
    done = 0

    def __init__(self, folder):
        self.folder = folder

    def step(self, *_, **__):
        self.cut()

    def stage(self, name, *_, **__):
        if name not in ("copying other tensors", "reading"):
            self.cut()

    def cut(self):
        if not Cutting.done:
            Cutting.done = sum(os.path.getsize(file) for file in self.folder.glob("*.safetensors"))
            for file in self.folder.glob("*.safetensors"):
                os.truncate(file, 4096)

acts = {
    "compress": lambda: compress(dense, out, QUICK, progress=Cutting(dense)),
    "probe": lambda: probe(str(dense), make_probe_config(workers=1), Cutting(dense)),
    "plan": lambda: find_plan(SourceReader(dense), QUICK, make_planner_config(target_bytes_ratio=0.3), Cutting(dense)),
    "verify": lambda: verify(small, progress=Cutting(small)),
    "verify against": lambda: verify(small, dense, progress=Cutting(dense)),
    "restore": lambda: restore(small, out, progress=Cutting(small)),
}
try:
    acts[command]()
except CheckpointError as err:
    print("cut", Cutting.done > 0, err)
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of one file of several pages, and what it is compressed to."""
    folder = tmp_path_factory.mktemp("cut")
    dense = save_tiny_model("olmoe", folder / "dense", torch.float32, hidden_size=64, intermediate_size=64)
    compress(dense, folder / "small", make_config(center="mean", workers=1))
    return dense, folder / "small"


@pytest.mark.parametrize("command", ["compress", "probe", "plan", "verify", "verify against", "restore"])
def test_a_file_that_is_cut_while_it_is_read(command: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    dense, small = (shutil.copytree(path, tmp_path / path.name) for path in pair)
    done = subprocess.run(
        [sys.executable, "-c", CUT, command, str(dense), str(small), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path.cwd(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("cut ")]
    assert line.startswith("cut True ")
    assert ".safetensors: can't" in line
    assert line.endswith("it ends too early")
    assert not (tmp_path / "out").exists()
