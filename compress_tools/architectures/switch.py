"""Switch Transformer: encoder-decoder, two-matrix experts ``wi``, ``wo``; the paper's design matrix ``[W1 | W2^T]``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress_tools.architectures.base import MoEArchitecture
from compress_tools.architectures.layouts import OneByOne


@dataclass(frozen=True)
class SwitchArchitecture(MoEArchitecture):
    """Encoder blocks count first, decoder blocks go on from there."""

    def layer_texts(self, config: Mapping[str, Any]) -> dict[int, str]:
        """``encoder.block.i.layer.1`` is layer i, ``decoder.block.j.layer.2`` is layer num_layers + j."""
        encoder = self.whole_number("num_layers", config.get("num_layers"))
        decoder = self.whole_number("num_decoder_layers", config.get("num_decoder_layers") or encoder)
        texts = {i: f"encoder.block.{i}.layer.1" for i in range(encoder)}
        return texts | {encoder + j: f"decoder.block.{j}.layer.2" for j in range(decoder)}


SWITCH = SwitchArchitecture(
    model_type="switch_transformers",
    title="Switch Transformer",
    models=("switch-base-8 (fp32)",),
    expert="{layer}.mlp.experts.expert_{expert}",
    projections=(("up_proj", "wi"), ("down_proj", "wo")),
    num_experts_keys=("num_experts",),
    hidden_size_keys=("d_model",),
    intermediate_size_keys=("d_ff",),
    num_layers_keys=(),
    layouts=(OneByOne("{layer}.mlp.experts.expert_{expert}", {"up_proj": "wi", "down_proj": "wo"}),),
    vllm=False,
    runs_in="transformers only: vLLM has no encoder-decoder T5",
)
