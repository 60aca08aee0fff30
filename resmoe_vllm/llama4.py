"""Llama-4's loader: compressed experts beside layers that were left stacked.

It decides once how a checkpoint's experts lie: after the first stacked tensor it takes every later one for stacked, and
finds no parameter for ours. So for tensors of ours it is told each time that they lie one by one.
"""

from functools import wraps
from typing import Any

from torch import Tensor

from compress_tools.format.tensors import is_resmoe_name
from resmoe_vllm.compat import llama4_decoder


def load_by_name() -> None:
    """Make the loader decide by each tensor's name; repeatable."""
    decoder, make_mapping = llama4_decoder()
    original = decoder.load_moe_expert_weights
    if hasattr(original, "resmoe"):
        return

    @wraps(original)
    def load_moe_expert_weights(
        self: Any,
        name: str,
        loaded_weight: Tensor,
        params_dict: dict[str, Any],
        loaded_params: set[str],
        expert_params_mapping: list[tuple[str, str, int, str]],
        fused: bool = True,  # noqa: FBT001, FBT002  vLLM's signature
    ) -> Any:
        if is_resmoe_name(name):
            fused = False
            expert_params_mapping = make_mapping(
                self,
                ckpt_gate_proj_name="gate_proj",
                ckpt_down_proj_name="down_proj",
                ckpt_up_proj_name="up_proj",
                num_experts=self.num_experts,
                num_redundant_experts=self.n_redundant_experts,
            )
        return original(self, name, loaded_weight, params_dict, loaded_params, expert_params_mapping, fused=fused)

    load_moe_expert_weights.__dict__["resmoe"] = True
    decoder.load_moe_expert_weights = load_moe_expert_weights
