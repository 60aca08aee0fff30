"""LoRA beside compressed experts: on attention as merged into the restored twin, on experts refused by name."""

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress_tools.config import make_config
from compress_tools.errors import ConfigError
from compress_tools.pipeline import compress
from compress_tools.stored.restore import restore
from tests.resmoe_vllm import serving
from tests.resmoe_vllm.adapters import ALPHA, ATTENTION, RANK, write_adapter
from tests.resmoe_vllm.twins import tiny_qwen3_moe

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
LAYERS = 3


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: own for file in sorted(folder.glob("*.safetensors")) for name, own in load_file(file).items()}


def merge(model: Path, adapter: Path) -> None:
    """Add an adapter's products to the weights of a dense checkpoint: the model that it stands for."""
    parts = load_file(adapter / "adapter_model.safetensors")
    for file in sorted(model.glob("*.safetensors")):
        tensors = load_file(file)
        for name, own in tensors.items():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in parts:
                own += ALPHA / RANK * parts[f"{stem}.lora_B.weight"] @ parts[f"{stem}.lora_A.weight"]
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``small`` (the last layer left dense), ``merged`` (its twin with the adapter) and adapters."""
    root = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    tiny_qwen3_moe(LAYERS).save_pretrained(root / "source")
    compress(root / "source", root / "small", make_config(method="prune", layers=f"0-{LAYERS - 2}"))
    restore(root / "small", root / "merged")
    weights = tensors_of(root / "source")
    write_adapter(root / "attention", weights, LAYERS, ATTENTION)
    write_adapter(root / "experts", weights, LAYERS, (*ATTENTION, "mlp.experts.1.up_proj"))
    merge(root / "merged", root / "attention")
    return root


def generate(llm, **options: object) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy tokens of each prompt, and log-probabilities of the whole vocabulary at the first, ``[prompts, V]``."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=10, temperature=0, detokenize=False, ignore_eos=True, logprobs=-1)
    prompts = [{"prompt_token_ids": ids} for ids in serving.PROMPTS]
    outputs = [out.outputs[0] for out in llm.generate(prompts, params, use_tqdm=False, **options)]
    first = [[out.logprobs[0][token].logprob for token in sorted(out.logprobs[0])] for out in outputs]
    return [list(out.token_ids) for out in outputs], torch.tensor(first)


def start(folder: Path, **options: object):
    return serving.start(folder, dtype="float32", enable_prefix_caching=False, max_logprobs=-1, **options)


@pytest.fixture(scope="module")
def engine(folders: Path) -> Iterator[object]:
    llm = start(folders / "small", enable_lora=True, max_lora_rank=RANK)
    yield llm
    del llm
    gc.collect()


def test_an_adapter_on_attention_is_the_twin_with_it_merged(engine, folders: Path) -> None:
    from vllm.lora.request import LoRARequest

    before, at_first = generate(engine)
    adapted, found = generate(engine, lora_request=LoRARequest("attention", 1, str(folders / "attention")))
    after, _ = generate(engine)
    llm = start(folders / "merged")
    merged, expected = generate(llm)
    del llm
    gc.collect()

    assert adapted == merged
    assert (found - expected).abs().max() < 1e-3
    assert (found - at_first).abs().max() > 0.1
    assert adapted != before
    assert after == before


def test_an_adapter_on_experts_is_refused_by_name(engine, folders: Path) -> None:
    from vllm.lora.request import LoRARequest

    message = r"LoRA adapter 'mine' .* has weights for experts: .*doesn't support LoRA on experts.*`resmoe restore`"
    with pytest.raises(ConfigError, match=message):
        engine.llm_engine.add_lora(LoRARequest("mine", 2, str(folders / "experts")))


def test_other_faults_of_an_adapter_are_vllms_to_say(engine, folders: Path, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    shutil.copytree(folders / "attention", tmp_path / "odd")
    tensors = load_file(tmp_path / "odd" / "adapter_model.safetensors")
    odd = {name.replace("q_proj", "colour_proj"): own for name, own in tensors.items()}
    save_file(odd, tmp_path / "odd" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="colour_proj") as caught:
        engine.llm_engine.add_lora(LoRARequest("odd", 3, str(tmp_path / "odd")))
    assert not isinstance(caught.value, ConfigError)


def test_experts_among_the_target_modules_stop_vllm(folders: Path) -> None:
    with pytest.raises(ConfigError, match="--lora-target-modules names 'experts': resmoe doesn't support LoRA on exp"):
        start(folders / "small", enable_lora=True, lora_target_modules=["q_proj", "experts"])
