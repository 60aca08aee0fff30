"""The families this version knows, by ``model_type``. A new family is one file and one line here."""

from typing import Any

from compress_tools.architectures.base import MoEArchitecture
from compress_tools.architectures.deepseek import DEEPSEEK_MOE, DEEPSEEK_V2, DEEPSEEK_V3, DOTS1
from compress_tools.architectures.ernie import ERNIE4_5_MOE
from compress_tools.architectures.glm import GLM4_MOE
from compress_tools.architectures.gpt_oss import GPT_OSS
from compress_tools.architectures.mixtral import MINIMAX_M2, MIXTRAL, PHIMOE
from compress_tools.architectures.olmoe import OLMOE
from compress_tools.architectures.qwen_moe import QWEN2_MOE, QWEN3_MOE
from compress_tools.architectures.switch import SWITCH
from compress_tools.errors import UnsupportedArchitectureError

ARCHITECTURES: tuple[MoEArchitecture, ...] = (
    MIXTRAL,
    DEEPSEEK_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    QWEN2_MOE,
    QWEN3_MOE,
    OLMOE,
    PHIMOE,
    GLM4_MOE,
    DOTS1,
    ERNIE4_5_MOE,
    MINIMAX_M2,
    GPT_OSS,
    SWITCH,
)


def find_architecture(config: dict[str, Any]) -> MoEArchitecture:
    """Look a family up by config.json's ``model_type``.

    Raises:
        UnsupportedArchitectureError: unknown; lists the known ones.
    """
    model_type = config.get("model_type")
    for architecture in ARCHITECTURES:
        if architecture.model_type == model_type:
            return architecture
    known = ", ".join(sorted(architecture.model_type for architecture in ARCHITECTURES))
    raise UnsupportedArchitectureError(
        f"config.json: model_type {model_type!r} is not a known MoE family; known: {known}"
    )
