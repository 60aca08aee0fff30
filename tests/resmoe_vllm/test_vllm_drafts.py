"""Multi-token prediction in vLLM: the same tokens as without, and the drafts of the restored twin."""

import gc
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.models.tiny_drafts import WITHOUT_EXPERTS, add_draft
from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.config import make_config
from compress_tools.pipeline import compress
from compress_tools.source.moe_source import open_source
from compress_tools.source.reader import CheckpointReader
from compress_tools.stored.restore import restore
from tests.resmoe_vllm import serving

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
# One family of each naming. Qwen3-Next with attention in every layer: the linear one takes bfloat16 alone on a CPU.
FAMILIES = {"glm4_moe": {}, "hy_v3": {}, "qwen3_next": {"layer_types": ["full_attention"] * 4}}
SPECULATION = {"method": "mtp", "num_speculative_tokens": 1}


class Run(NamedTuple):
    """What an engine did: tokens of each prompt, tokens that were drafted in each step, and method of the draft."""

    tokens: list[list[int]]
    drafted: list[list[int]]
    methods: dict[str, str]


def run(folder: Path, **options: object) -> Run:
    from vllm import SamplingParams
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    llm = serving.start(folder, dtype="float32", enable_prefix_caching=False, **options)
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    drafter, drafted, methods = getattr(runner, "drafter", None), [], {}
    if drafter is not None:
        propose = drafter.propose

        def recorded(*args, **kwargs):
            found = propose(*args, **kwargs)
            drafted.append(found.flatten().tolist())
            return found

        drafter.propose = recorded
        experts = [module for module in drafter.model.modules() if isinstance(module, RoutedExperts)]
        methods = {module.layer_name: type(module.quant_method).__name__ for module in experts}
    params = SamplingParams(max_tokens=serving.MAX_TOKENS, temperature=0, detokenize=False, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in serving.PROMPTS], params, use_tqdm=False)
    del llm, runner, drafter
    gc.collect()
    return Run([list(out.outputs[0].token_ids) for out in outputs], drafted, methods)


def compressed(family: str, folder: Path, **changes: object) -> Path:
    """The family's tiny model with a draft, compressed: ``source`` and ``small``."""
    source = add_draft(save_tiny_model(family, folder / "source", torch.float32, **changes), family)
    compress(source, folder / "small", make_config(method="prune", retain_ratio=0.4))
    return source


@pytest.mark.parametrize("family", FAMILIES)
def test_speculation_changes_no_token(family: str, tmp_path: Path) -> None:
    source = compressed(family, tmp_path, **FAMILIES[family])
    compress(source, tmp_path / "plain_draft", make_config(method="prune", retain_ratio=0.4, layers="decoder"))
    restore(tmp_path / "small", tmp_path / "twin")

    without = run(tmp_path / "small")
    small = run(tmp_path / "small", speculative_config=SPECULATION)
    twin = run(tmp_path / "twin", speculative_config=SPECULATION)
    plain = run(tmp_path / "plain_draft", speculative_config=SPECULATION)

    assert without.drafted == []
    assert small.tokens == without.tokens
    assert plain.tokens == without.tokens
    # The draft's own experts are the twin's: drafted tokens say so, which the accepted ones alone would not.
    assert (small.tokens, small.drafted) == (twin.tokens, twin.drafted)
    assert plain.drafted != twin.drafted
    assert set(small.methods.values()) == {"ResMoEFusedMoEMethod"}
    assert "ResMoEFusedMoEMethod" not in plain.methods.values()
    assert len(plain.methods) == 1


@pytest.mark.parametrize("family", WITHOUT_EXPERTS)
def test_a_draft_without_experts_is_copied_and_served(family: str, tmp_path: Path) -> None:
    source = compressed(family, tmp_path)
    without, drafting = run(tmp_path / "small"), run(tmp_path / "small", speculative_config=SPECULATION)
    assert drafting.tokens == without.tokens
    assert drafting.methods == {}
    assert any(drafting.drafted)
    assert not open_source(CheckpointReader(source)).drafts


def test_a_draft_with_latent_attention_is_the_twins(tmp_path: Path) -> None:
    """With MLA vLLM's CPU build moves log-probabilities under speculation, of dense checkpoints too; not of drafts."""
    compressed("glm4_moe_lite", tmp_path)
    restore(tmp_path / "small", tmp_path / "twin")
    options = {"attention_backend": "CPU_MLA", "speculative_config": {**SPECULATION, "attention_backend": "CPU_MLA"}}
    small, twin = run(tmp_path / "small", **options), run(tmp_path / "twin", **options)
    assert (small.tokens, small.drafted) == (twin.tokens, twin.drafted)
    assert set(small.methods.values()) == {"ResMoEFusedMoEMethod"}
