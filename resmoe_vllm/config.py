"""The ``quantization_config`` block as vLLM's QuantizationConfig: which layer is served by which method."""

from typing import Any

import torch

from compress_tools.format.schema import QUANT_METHOD, ResMoEFormat, parse_format
from resmoe_vllm.compat import (
    LinearBase,
    QuantizationConfig,
    QuantizeMethodBase,
    RoutedExperts,
    UnquantizedFusedMoEMethod,
    VocabParallelEmbedding,
    extract_layer_index,
)
from resmoe_vllm.fused_moe import ResMoEFusedMoEMethod
from resmoe_vllm.plain_layers import PlainEmbeddingMethod, PlainLinearMethod


class ResMoEConfig(QuantizationConfig):
    """Serves the MoE layers listed in the format block compressed and all others as plain vLLM would.

    Args:
        fmt: the validated format block.
    """

    def __init__(self, fmt: ResMoEFormat) -> None:
        super().__init__()
        self.fmt = fmt

    def get_name(self) -> str:
        """Name under ``quant_method`` in config.json."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Model dtypes; whether a kernel exists is decided per layer (ops.py)."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """No CUDA capability is excluded here; ops.py decides."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """The block lives in config.json only."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ResMoEConfig":
        """Validate the block of config.json.

        Raises:
            FormatError: see ``parse_format``.
        """
        return cls(parse_format(config))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Method of one layer. MoE layers are found by decoder layer index: the rest of the prefix varies."""
        if isinstance(layer, RoutedExperts):
            index = extract_layer_index(prefix)
            if index not in self.fmt.layers:
                return UnquantizedFusedMoEMethod(layer.moe_config)
            return ResMoEFusedMoEMethod(layer.moe_config, self.fmt, index)
        if isinstance(layer, LinearBase):
            return PlainLinearMethod(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return PlainEmbeddingMethod(prefix)
        return None
