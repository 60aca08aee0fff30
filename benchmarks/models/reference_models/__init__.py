"""Small real MoE language models, trained here from the standard library's source, without any download."""

from benchmarks.models.reference_models.build import ReferenceModelReport, build_reference_model
from benchmarks.models.reference_models.config import PRESETS, ReferenceModelConfig, preset_config

__all__ = [
    "PRESETS",
    "ReferenceModelConfig",
    "ReferenceModelReport",
    "build_reference_model",
    "preset_config",
]
