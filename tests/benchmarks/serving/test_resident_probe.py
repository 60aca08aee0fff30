"""Counting resident bytes: one module in this process, and reports from other processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.serving.resident_probe import Reader, expert_bytes

# What a vLLM process does: plugins first, then the model; `layer_name` is set before the parameters.
PROCESS = """
import time, torch
from importlib.metadata import entry_points
(plugin,) = entry_points(group="vllm.general_plugins", name="resmoe_resident_probe")
for _ in range(2):
    plugin.load()()
class RoutedExperts(torch.nn.Module):
    def __init__(self, name, size):
        super().__init__()
        self.layer_name = name
        self.w = torch.nn.Parameter(torch.zeros(9))
        self.w = torch.nn.Parameter(torch.zeros(size))  # replaced after loading, as vLLM does
layers = [RoutedExperts("layers.0", 100), RoutedExperts("layers.1", 50)]
other = torch.nn.Linear(1000, 1000)
time.sleep(60)
"""


def test_each_storage_counts_once_and_whole():
    module = torch.nn.Module()
    whole = torch.zeros(100, dtype=torch.bfloat16)
    module.weight = torch.nn.Parameter(whole[:10])
    module.view = whole[50:]
    module.register_buffer("offsets", torch.zeros(3, dtype=torch.int32), persistent=False)
    module.quant_method = type("Method", (), {})()
    module.quant_method.table = torch.zeros(7, dtype=torch.uint8)
    module.meta = torch.zeros(1000, device="meta")
    assert expert_bytes(module) == 200 + 12 + 7


@pytest.mark.parametrize("num_processes", [1, 2])
def test_reports_are_summed_over_processes(tmp_path: Path, num_processes: int):
    reader = Reader(tmp_path / "probe")
    env = reader.environment(os.environ)
    processes = [subprocess.Popen([sys.executable, "-c", PROCESS], env=env) for _ in range(num_processes)]
    try:
        while len(list(tmp_path.glob("probe/reports/*.json"))) < num_processes:
            assert all(process.poll() is None for process in processes)
            time.sleep(0.2)
        assert reader.read() == {"layers.0": 400 * num_processes, "layers.1": 200 * num_processes}
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_silence_is_an_error(tmp_path: Path):
    with pytest.raises(TimeoutError, match="no server process reported"):
        Reader(tmp_path / "probe").read(timeout_s=0.5)
