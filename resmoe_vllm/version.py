"""The vLLM range this plugin was tested with, and the refusal outside it; vLLM is imported inside calls."""

import re
from typing import Any

from typing_extensions import override

from compress_tools.errors import ConfigError
from compress_tools.format.schema import QUANT_METHOD

TESTED_FROM = (0, 30)
TESTED_BELOW = (0, 34)


def version_complaint(version: str) -> str | None:
    """One sentence saying why this vLLM is refused; None when it is within the tested range."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match and TESTED_FROM <= (int(match[1]), int(match[2])) < TESTED_BELOW:
        return None
    low, high = (f"{major}.{minor}" for major, minor in (TESTED_FROM, TESTED_BELOW))
    return (
        f"vLLM {version} is outside the range resmoe was tested with, {low} <= vllm < {high}: "
        f'install vLLM with `pip install "vllm>={low},<{high}"`'
    )


def register_refusal(complaint: str) -> None:
    """Register a quantization config that raises ``complaint`` when a ResMoE checkpoint is opened.

    Raising in ``register()`` instead would stop vLLM for every other model, or be logged and followed by
    "Unknown quantization method". Uses only names that vLLM kept in every version since 0.6.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class RefusedConfig(QuantizationConfig):
        """Never instantiated: ``from_config`` raises."""

        def get_name(self) -> str:
            return QUANT_METHOD

        def get_supported_act_dtypes(self) -> list[Any]:
            return []

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        @override
        def from_config(cls, config: dict[str, Any]) -> "RefusedConfig":
            raise ConfigError(complaint)

        @override
        def get_quant_method(self, layer: Any, prefix: str) -> None:
            raise ConfigError(complaint)

    register_quantization_config(QUANT_METHOD)(RefusedConfig)
