"""What the plugin puts in place of vLLM's own."""

import types

import pytest
import torch
from vllm.model_executor.model_loader import weight_utils

from resmoe_vllm import compat

PARAMS = {
    name: torch.nn.Parameter(torch.zeros(1))
    for name in (
        "layers.0.moe.experts.routed_experts.w13_resmoe_center",
        "layers.0.moe.experts.routed_experts.w13_weight",
    )
}


@pytest.mark.parametrize("suffix", ["resmoe_center", "weight"])
def test_expert_names_are_completed(suffix: str) -> None:
    remap = weight_utils.maybe_remap_moe_expert_param_name
    completed = f"layers.0.moe.experts.routed_experts.w13_{suffix}"
    assert remap(f"layers.0.moe.experts.w13_{suffix}", PARAMS) == completed
    assert remap(completed, PARAMS) == completed
    assert remap("layers.0.moe.experts.w2_resmoe_u", PARAMS) == "layers.0.moe.experts.w2_resmoe_u"
    assert remap("layers.0.norm.weight", PARAMS) == "layers.0.norm.weight"


def test_a_model_that_was_imported_before_the_plugin_completes_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    own = weight_utils.maybe_remap_moe_expert_param_name.resmoe_wraps
    model = types.ModuleType("model")
    model.maybe_remap_moe_expert_param_name = own
    monkeypatch.setitem(compat.sys.modules, "model", model)
    monkeypatch.setattr(weight_utils, compat.REMAP, own)
    compat.complete_expert_names()
    assert model.maybe_remap_moe_expert_param_name is weight_utils.maybe_remap_moe_expert_param_name
    assert model.maybe_remap_moe_expert_param_name.resmoe_wraps is own
    compat.complete_expert_names()
    assert weight_utils.maybe_remap_moe_expert_param_name.resmoe_wraps is own
