"""The families this version knows, by ``model_type``. A new family is one file and one line here."""

from typing import Any

from compress_tools.architectures.base import MoEArchitecture
from compress_tools.architectures.mixtral import MIXTRAL
from compress_tools.architectures.olmoe import OLMOE
from compress_tools.architectures.qwen_moe import QWEN3_MOE
from compress_tools.errors import UnsupportedArchitectureError

ARCHITECTURES: tuple[MoEArchitecture, ...] = (MIXTRAL, OLMOE, QWEN3_MOE)


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
