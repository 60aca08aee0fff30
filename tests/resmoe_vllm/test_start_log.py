"""What a start says: one block for all layers of a model, and the kernel that serves them with the time it took."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compress_tools.version import __version__
from resmoe_vllm import ops
from resmoe_vllm.kernels.cpu import build, native
from resmoe_vllm.start_log import LoadedLayer, StartLog, held_bytes


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What vLLM would show, record by record."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, keep = logging.getLogger("vllm.resmoe"), Keep()
    before = logger.level
    logger.addHandler(keep)
    logger.setLevel(logging.INFO)
    monkeypatch.setattr(native, "loaded", native.loaded.__wrapped__)
    yield found
    logger.removeHandler(keep)
    logger.setLevel(before)


SHAPE = "I 64, H 96 in bfloat16"
HEAD = f"resmoe {__version__}, format 3: "


def layer(coding: str = "no center + trellis (4-bit, joint)", held: int = 1_000_000, shape: str = SHAPE) -> LoadedLayer:
    return LoadedLayer(coding, shape, 8, held, 4_000_000)


def test_layers_are_told_once_the_last_is_bound_and_a_drafts_after(told: list[str]) -> None:
    log = StartLog(3)
    for index in (0, 1, 2, 4):
        log.expect(index)
    for index in (4, 0, 2):
        log.add(index, layer(), "C++, AVX2")
    assert told == []
    log.add(1, layer("dense center + prune", 2_000_000), "C++, AVX2")
    assert told == [
        f"{HEAD}4 compressed MoE layers\n"
        "  layers 0, 2, 4: no center + trellis (4-bit, joint)\n"
        "  layer 1: dense center + prune\n"
        "  experts on this rank: 5.0 MB in memory, dense 16.0 MB (31.2%)\n"
        "  kernel for experts of I 64, H 96 in bfloat16: C++, AVX2"
    ]
    log.expect(46)
    log.add(46, layer(), "C++, AVX2")
    assert told[1].startswith(f"{HEAD}1 compressed MoE layers\n  layer 46: ")


def test_what_is_left_refused_or_held_otherwise_stands_in_the_block(told: list[str]) -> None:
    log = StartLog(3)
    for left in (5, "mtp.layers.0.mlp.experts", 3, 4):
        log.leave(left)
    log.expect(0)
    for _ in range(2):
        log.note("LoRA: adapters with weights for experts are refused")
    log.say("the rest is held in 8 bits")
    assert told == []
    log.add(0, layer(), "Triton")
    (text,) = told
    assert "\n  layers 3-5: not compressed, vLLM's own kernel\n  mtp.layers.0.mlp.experts: not compressed, vL" in text
    assert text.endswith("\n  LoRA: adapters with weights for experts are refused\n  the rest is held in 8 bits")
    log.say("the output layer is restored")
    assert told[1:] == ["resmoe: the output layer is restored"]


def test_each_shape_has_its_kernel(told: list[str]) -> None:
    log = StartLog(2)
    for index, (shape, kernel) in enumerate([("A", "C++"), ("B", "Triton"), ("A", "C++"), ("A", "C++")]):
        log.expect(index)
        log.expect(index + 1) if index < 3 else None
        log.add(index, layer(shape=shape), kernel)
    (text,) = told
    assert text.endswith("\n  kernel, layers 0, 2-3, A: C++\n  kernel, layer 1, B: Triton")


def test_runs_of_layers_are_short(told: list[str]) -> None:
    log = StartLog(3)
    for index in (8, 7, 1, 2, 3, 5):
        log.expect(index)
    for index in (8, 7, 1, 2, 3, 5):
        log.add(index, layer(), "Triton")
    assert "  layers 1-3, 5, 7-8: " in told[0]


def test_a_rank_without_experts(told: list[str]) -> None:
    StartLog(3).add(0, LoadedLayer("x", SHAPE, 0, 0, 0), "Triton")
    assert told == [f"{HEAD}1 compressed MoE layers\n  layer 0: x\n  no experts on this rank"]


def test_parameters_and_buffers_count() -> None:
    module = torch.nn.Module()
    module.register_parameter("codes", torch.nn.Parameter(torch.zeros(3, 5, dtype=torch.uint8), requires_grad=False))
    module.register_buffer("expert_map", torch.zeros(7, dtype=torch.int32))
    assert held_bytes(module) == 15 + 28


@pytest.mark.skipif(native.load() is None, reason="no C++ kernel here")
def test_the_kernel_is_told_with_its_path_and_time(told: list[str]) -> None:
    words = ops.describe_kernel("cpu")
    assert words.startswith(f"C++, path {build.chosen_path()}; compiled and tested before, loaded in ")
    assert words.endswith(" s")
    assert told == []  # nothing was compiled
    assert ops.describe_kernel("cuda") == "Triton"


@pytest.mark.skipif(build.missing_cpu_flags() != [], reason="no C++ kernel here")
def test_no_compiler_is_told_as_plain_torch(told: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = native.loaded()
    assert found.library is None
    assert found.words == "plain torch: found neither g++ nor clang++; install g++ and start again"


@pytest.mark.skipif(build.missing_cpu_flags() != [], reason="no C++ kernel here")
def test_a_cache_that_cannot_be_written_is_told(
    told: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert native.loaded().words.startswith(
        f"plain torch: cannot write to {tmp_path}/cache/resmoe, where built kernels are"
    )
