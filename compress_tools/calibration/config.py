"""What `resmoe calibrate` is asked: validated before a model is built."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress_tools.config import validated
from compress_tools.evaluation.config import DType


class CalibrationConfig(BaseModel):
    """A text, or how much the model is to write itself, and how it is run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str | None = Field(None, description="Text file (UTF-8), of the kind that the model is used for.")
    self_generated: int | None = Field(
        None,
        ge=2,
        description="No text: so many tokens that the model writes itself, at temperature 1, seeded. For that the "
        "whole model is in memory.",
    )
    max_tokens: int = Field(65536, ge=2, description="Use only so many tokens of the text's beginning.")
    window: int | None = Field(
        None,
        ge=2,
        description="Tokens that the model sees at once. [default: 1024, or one less than the model's context]",
    )
    coefficients: bool = Field(
        default=False,
        description="Also measure, by noise on one layer's experts at a time, what an error of each layer costs in KL, "
        "for --optimize output. Takes half as many passes over 4096 tokens as there are layers, and holds their "
        "activations.",
    )
    dtype: DType = Field(
        "float32",
        description="dtype that the model runs in; auto: the one it is stored in, half the memory, but too coarse for "
        "--coefficients.",
    )
    seed: int = Field(0, ge=0, description="Seed of --self-generated and --coefficients.")
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with the model, where it can't be loaded without."
    )

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        if (self.text is None) == (self.self_generated is None):
            raise ValueError("give one of --text FILE and --self-generated N")
        if self.text is None and "max_tokens" in self.model_fields_set:
            raise ValueError("--max-tokens has no effect with --self-generated, which says how many")
        if self.coefficients and self.dtype != "float32":
            raise ValueError(f"--coefficients measures differences that --dtype {self.dtype} rounds away; use float32")
        return self


def make_calibration_config(**options: object) -> CalibrationConfig:
    """Build a config from keyword options.

    Raises:
        ConfigError: names the option, the value found and the rule.
    """
    return validated(CalibrationConfig, options)
