"""Llama-4's language part in vLLM: router weights on the input, and compressed experts beside stacked ones.

vLLM's class of the whole model imports torchvision, which is not here; it has this decoder inside.
"""

import gc
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks.families import MAX_DEVIATION, vllm_logprobs
from benchmarks.models.tiny_models import TINY_CONFIGS
from compress_tools.config import make_config
from compress_tools.pipeline import compress
from compress_tools.stored.restore import restore

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's tiny model without its vision; MoE layers 1 and 3."""
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(**TINY_CONFIGS["llama4"][1]["text_config"])
    folder = tmp_path_factory.mktemp("llama4") / "source"
    transformers.Llama4ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exact(source: Path) -> torch.Tensor:
    """The source's log-probabilities in fp32."""
    return vllm_logprobs(source)


@pytest.mark.parametrize("layers", ["all", "1", "3"])
def test_it_equals_its_restored_twin(layers: str, source: Path, exact: torch.Tensor, tmp_path: Path) -> None:
    compress(source, tmp_path / "small", make_config(method="prune", layers=layers))
    restore(tmp_path / "small", tmp_path / "twin")
    found, twin = vllm_logprobs(tmp_path / "small"), vllm_logprobs(tmp_path / "twin")
    gc.collect()
    assert (found - twin).abs().max() <= MAX_DEVIATION
    assert (twin - exact).abs().max() > 10 * MAX_DEVIATION


def test_bfloat16_rounds_as_vllm_does(source: Path, exact: torch.Tensor, tmp_path: Path) -> None:
    """Experts that are stored whole: what is left between the two is the order of sums."""
    compress(source, tmp_path / "small", make_config(method="prune", retain_ratio=1.0, center="none"))
    found = vllm_logprobs(tmp_path / "small", dtype="bfloat16")
    plain = vllm_logprobs(source, dtype="bfloat16")
    noise = (plain - exact).abs()
    assert (found - plain).abs().mean() <= noise.mean()
