"""Real tiny checkpoints, written by transformers, seeded; built once for each test session."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():
    # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from benchmarks.models.reference_models import build_reference_model, preset_config
from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.config import make_config
from compress_tools.pipeline import compress

# The same examples in every run, however busy the machine is; a test says how many.
settings.register_profile(
    "bounded",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("bounded")

_set_num_threads = torch.set_num_threads


@pytest.fixture(autouse=True)
def threads_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine in this process replaces the function by one that does nothing, for good."""
    monkeypatch.setattr(torch, "set_num_threads", _set_num_threads)


@pytest.fixture(autouse=True)
def transformers_keeps_its_classes() -> Iterator[None]:
    """No engine in this process leaves a class of transformers decorated: other tests could make no model of it."""
    yield
    wrapper = sys.modules.get("vllm.compilation.wrapper")
    found = wrapper.TorchCompileWithNoGuardsWrapper.__subclasses__() if wrapper else []
    assert [cls for cls in found if not cls.__module__.startswith("vllm.")] == []


@pytest.fixture(scope="session")
def tiny_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral, 3 layers, 4 experts, H 64, I 48, fp32, several shards."""
    return save_tiny_model(
        "mixtral", tmp_path_factory.mktemp("mixtral") / "model", torch.float32, max_shard_size="120kB"
    )


@pytest.fixture(scope="session")
def tiny_mixtral_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape in bf16, one shard."""
    return save_tiny_model("mixtral", tmp_path_factory.mktemp("mixtral-bf16") / "model", torch.bfloat16)


@pytest.fixture(scope="session")
def tiny_olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OLMoE, 2 layers, 8 experts, top 3, H 64, I 24, fp32."""
    return save_tiny_model("olmoe", tmp_path_factory.mktemp("olmoe") / "model", torch.float32)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(original, compressed): a trained tiny Mixtral with tokenizer and text, fp32, V 384, context 32; 2 % kept."""
    folder = tmp_path_factory.mktemp("trained")
    build_reference_model(preset_config("tiny", dtype="float32"), folder / "original")
    compress(folder / "original", folder / "small", make_config(retain_ratio=0.02, center="none"))
    return folder / "original", folder / "small"
