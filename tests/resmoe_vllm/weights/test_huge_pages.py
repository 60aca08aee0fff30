"""Memory of weights: large pages where Linux gives them, and plain memory everywhere else."""

import mmap
import re
from pathlib import Path

import pytest
import torch

from resmoe_vllm.weights import huge_pages

CPU = torch.device("cpu")
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes() -> int:
    """Of this process, in large pages."""
    found = re.findall(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps").read_text())
    return 1024 * sum(map(int, found))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bfloat16, torch.float32, torch.int32])
@pytest.mark.parametrize("shape", [(0, 3), (1, 5), (7, 1001), (3, 2**20 + 8), (4, 2**21)])
def test_is_a_tensor_like_any_other(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Shape, dtype and order; what is written is read, to the last value; and none shares another's memory."""
    made = [huge_pages.empty(shape, dtype, CPU) for _ in range(2)]
    for number, tensor in enumerate(made):
        assert (tensor.shape, tensor.dtype, tensor.device, tensor.is_contiguous()) == (shape, dtype, CPU, True)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        tensor.fill_(number)
    for number, tensor in enumerate(made):
        assert bool((tensor == number).all())


def test_large_ones_begin_at_a_large_page() -> None:
    """So that all of it can lie in such; under a default device, too, as vLLM makes layers."""
    with torch.device("cpu"):
        tensor = huge_pages.empty((5, 2**20), torch.int8, torch.get_default_device())
    assert tensor.data_ptr() % huge_pages.PAGE == 0


def test_other_devices_are_torchs() -> None:
    """What is not a CPU's is left to torch."""
    assert huge_pages.empty((8, 2**20), torch.int8, torch.device("meta")).device.type == "meta"


def test_small_pages_serve_where_there_are_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without the advice."""
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert huge_pages.empty((8, 2**20), torch.int8, CPU).fill_(3).sum(dtype=torch.int64) == 3 * 8 * 2**20


@pytest.mark.skipif(not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="this system gives no large pages")
def test_memory_is_in_large_pages_and_given_back() -> None:
    """Half of it at least, where memory is in pieces; and none is left once the tensor is gone."""
    before = huge_bytes()
    tensor = huge_pages.empty((32, huge_pages.PAGE), torch.uint8, CPU).fill_(1)
    assert huge_bytes() - before >= tensor.nbytes // 2
    del tensor
    assert huge_bytes() - before < huge_pages.PAGE
