"""`python -m benchmarks.kernels` needs torch and Triton, and nothing else of what the project uses."""

import subprocess
import sys

from benchmarks.harness.environment import REPO

SCRIPT = """
import importlib.abc, sys

ABSENT = {"click", "lapx", "matplotlib", "ot", "pydantic", "rich", "safetensors", "transformers", "vllm", "yaml"}


class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"{name} is not here", name=name)


sys.meta_path.insert(0, Absent())
import benchmarks.kernels.__main__, benchmarks.kernels.layers, resmoe_vllm.kernels.gpu.launches
"""


def test_torch_and_triton_are_enough() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
