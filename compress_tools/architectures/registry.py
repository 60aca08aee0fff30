"""The families this version knows, by ``model_type``. A new family is one file and one line here."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from compress_tools.architectures.arcee import AFMOE
from compress_tools.architectures.bailing import BAILING_MOE, PARAM2MOE, SARVAM_MOE
from compress_tools.architectures.base import KNOWN_LAYOUTS, ROOTS, MoEArchitecture, config_parts, target_names
from compress_tools.architectures.cohere import COHERE2_MOE
from compress_tools.architectures.deepseek import (
    AXK1,
    DEEPSEEK_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V4,
    DEEPSEEK_V32,
    DOTS1,
)
from compress_tools.architectures.ernie import ERNIE4_5_MOE
from compress_tools.architectures.exaone import EXAONE_MOE
from compress_tools.architectures.gemma import GEMMA4
from compress_tools.architectures.glm import GLM4_MOE, GLM4_MOE_LITE, GLM4V_MOE, GLM5_NEXT, GLM_MOE_DSA
from compress_tools.architectures.gpt_oss import GPT_OSS
from compress_tools.architectures.granite import GRANITEMOE, GRANITEMOEHYBRID, GRANITEMOESHARED
from compress_tools.architectures.hunyuan import HUNYUAN_V1_MOE, HY_V3
from compress_tools.architectures.inkling import INKLING
from compress_tools.architectures.jamba import JAMBA
from compress_tools.architectures.kimi import KIMI_K25, KIMI_LINEAR
from compress_tools.architectures.laguna import LAGUNA
from compress_tools.architectures.layouts import ExpertLayout, OneByOne
from compress_tools.architectures.lfm2 import LFM2_MOE
from compress_tools.architectures.llama import LLAMA4
from compress_tools.architectures.longcat import LONGCAT_FLASH
from compress_tools.architectures.mistral import MISTRAL4
from compress_tools.architectures.mixtral import MINIMAX, MINIMAX_M2, MINIMAX_M3, MIXTRAL, PHIMOE
from compress_tools.architectures.nemotron import NEMOTRON_H
from compress_tools.architectures.olmoe import FLEX_OLMO, OLMOE
from compress_tools.architectures.qwen_moe import (
    QWEN2_MOE,
    QWEN3_5_MOE,
    QWEN3_MOE,
    QWEN3_NEXT,
    QWEN3_OMNI_MOE,
    QWEN3_VL_MOE,
)
from compress_tools.architectures.small_families import MELLUM, MIMO_V2, SOLAR_OPEN
from compress_tools.architectures.step import STEP3P5
from compress_tools.architectures.switch import SWITCH
from compress_tools.errors import UnsupportedArchitectureError
from compress_tools.format.schema import Projection

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
    QWEN3_NEXT,
    QWEN3_5_MOE,
    GEMMA4,
    GLM4_MOE_LITE,
    GLM_MOE_DSA,
    DEEPSEEK_V32,
    AFMOE,
    EXAONE_MOE,
    LFM2_MOE,
    COHERE2_MOE,
    MELLUM,
    MIMO_V2,
    SOLAR_OPEN,
    FLEX_OLMO,
    HUNYUAN_V1_MOE,
    HY_V3,
    JAMBA,
    LAGUNA,
    MINIMAX,
    NEMOTRON_H,
    QWEN3_VL_MOE,
    QWEN3_OMNI_MOE,
    GLM4V_MOE,
    LLAMA4,
    DEEPSEEK_V4,
    MINIMAX_M3,
    STEP3P5,
    MISTRAL4,
    KIMI_K25,
    KIMI_LINEAR,
    INKLING,
    GLM5_NEXT,
    BAILING_MOE,
    LONGCAT_FLASH,
    AXK1,
    SARVAM_MOE,
    PARAM2MOE,
    GRANITEMOE,
    GRANITEMOESHARED,
    GRANITEMOEHYBRID,
)

# Families that are understood, and can't be compressed: why.
REFUSED = {
    "ernie4_5_vl_moe": "its layers have two sets of experts of different sizes, for text and for pictures; "
    "a ResMoE layer holds one set of one size",
}


def find_architecture(config: Mapping[str, Any], names: Collection[str] = ()) -> MoEArchitecture:
    """Look a family up by config.json's ``model_type``, its own or that of its language part.

    Args:
        config: config.json.
        names: of the checkpoint's tensors. An unknown family whose experts lie in a known way gets a row made up
            from them.
    Raises:
        UnsupportedArchitectureError: unknown, lists the known ones; or one of ``REFUSED``.
    """
    model_type = config.get("model_type")
    for part in config_parts(config):
        if (why := REFUSED.get(str(part.get("model_type")))) is not None:
            raise UnsupportedArchitectureError(f"config.json: model_type {part['model_type']!r}: {why}")
        for architecture in ARCHITECTURES:
            if part.get("model_type") in architecture.model_types:
                return architecture
    if made := _made_up(str(model_type), config, names):
        return made
    known = ", ".join(sorted(architecture.model_type for architecture in ARCHITECTURES))
    raise UnsupportedArchitectureError(
        f"config.json: model_type {model_type!r} is not a known MoE family, and its experts lie in no known way"
        f"{expert_like(names)}; known families: {known}"
    )


def _made_up(model_type: str, config: Mapping[str, Any], names: Collection[str]) -> MoEArchitecture | None:
    """A row for a family that is not known, from the names of its experts; None where they are of no known kind."""
    block = config.get("quantization_config")
    if isinstance(block, dict) and isinstance(stored := block.get("names"), dict):
        # Our own checkpoint: its config says how experts were called, and so how they lay, but for the root.
        expert, projections = str(stored.get("expert")), dict(stored.get("projections") or {})
        root = max((root for root in ROOTS if expert.startswith(root)), key=len)
        stem = expert.removeprefix(root)
        known = [layout for layout in KNOWN_LAYOUTS if target_names(layout) == (stem, projections)]
        return _row(model_type, stem, projections, *(known or [OneByOne(stem, projections)]))
    for layout in KNOWN_LAYOUTS:
        alike = [other for other in KNOWN_LAYOUTS if other.pattern() == layout.pattern()]
        row = _row(model_type, *target_names(layout), *alike)
        if next(row.locate(names, config), None) is not None:
            return row
    return None


def _row(
    model_type: str, expert: str, projections: Mapping[Projection, str], *layouts: ExpertLayout
) -> MoEArchitecture:
    return MoEArchitecture(
        model_type=model_type,
        title=f"{model_type}, a family that is not known",
        expert=expert,
        projections=tuple(projections.items()),
        layouts=layouts,
        known=False,
    )


def expert_like(names: Collection[str]) -> str:
    """A clause that shows what names have ``expert`` in them; empty where none has."""
    alike = sorted({re.sub(r"\.\d+(?=\.|$)", ".N", name) for name in names if "expert" in name.lower()})
    if not alike:
        return ""
    return f" (found: {', '.join(alike[:4])}{f' and {len(alike) - 4} more' if len(alike) > 4 else ''})"
