"""What `resmoe eval` is asked: validated before a model is loaded."""

import json
from collections.abc import Collection
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress_tools.config import CompressionConfig, check_device, validated
from compress_tools.errors import ConfigError

Backend = Literal["transformers", "vllm"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
_CPU = CompressionConfig.model_fields["device"].default
_DTYPE: Any = Field("auto", description="dtype that the models run in; auto: the one they are stored in.")
_TRUST: Any = Field(
    default=False, description="Run Python code that comes with the models, where they can't be loaded without."
)


class TextConfig(BaseModel):
    """A text, how it is cut, and what reads it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = Field(description="Text file (UTF-8) whose tokens are scored.")
    against: str | None = Field(
        None,
        description="The original: adds KL divergence from its predictions (mean, 99th percentile and maximum over "
        "positions), and top-1 agreement with it.",
    )
    window: int | None = Field(
        None,
        ge=2,
        description="Tokens that the model sees at once. [default: 1024, or one less than the model's context]",
    )
    stride: int | None = Field(
        None,
        ge=1,
        description="Tokens from one window's begin to the next's; each token is scored once. [default: half a window]",
    )
    max_tokens: int | None = Field(None, ge=2, description="Use only so many tokens of the text's beginning.")
    backend: Backend = Field("transformers", description="What runs the models.")
    dtype: DType = _DTYPE
    top_k: int | None = Field(
        None,
        ge=1,
        description="With --backend vllm, KL over so many most probable tokens of each model and one bucket for all "
        "others, a lower bound. [default: the whole vocabulary up to 8192 tokens, 256 above]",
    )
    device: str = Field(_CPU, description="Where transformers runs: cpu, cuda, cuda:N; vLLM takes its own.")
    trust_remote_code: bool = _TRUST

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Self:
        if self.window is not None and self.stride is not None and self.stride > self.window:
            raise ValueError(f"--stride {self.stride} leaves out tokens between windows of --window {self.window}")
        if self.top_k is not None and (self.against is None or self.backend != "vllm"):
            raise ValueError(f"--top-k {self.top_k} has no effect without --against and --backend vllm")
        if self.backend == "vllm" and self.device != _CPU:
            raise ValueError(f"--device {self.device} has no effect with --backend vllm, which takes its own device")
        return self


def make_text_config(**options: object) -> TextConfig:
    """Build a config from keyword options.

    Raises:
        ConfigError: names the option, the value found and the rule; or the device is not there.
    """
    config = validated(TextConfig, options)
    check_device(config.device)
    return config


class TasksConfig(BaseModel):
    """lm-eval tasks, how they are asked, and what vLLM is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: str = Field(min_length=1, description="lm-eval tasks, separated by commas, run through vLLM.")
    include_path: str | None = Field(None, description="Directory of lm-eval task files (YAML) of your own.")
    limit: int | None = Field(None, ge=1, description="Use only so many examples of each task.")
    num_fewshot: int | None = Field(
        None, ge=0, description="Solved examples before each question. [default: each task's own]"
    )
    apply_chat_template: bool = Field(
        default=False, description="Ask as a user's message, in the model's chat template."
    )
    fewshot_as_multiturn: bool | None = Field(
        None,
        description="With --apply-chat-template, each solved example as two messages, or all of them in one. "
        "[default: lm-eval's]",
    )
    max_model_len: int | None = Field(
        None, ge=1, description="Tokens of context that vLLM makes room for. [default: the model's]"
    )
    tensor_parallel_size: int | None = Field(
        None, ge=1, description="Devices that vLLM spreads each layer over. [default: 1]"
    )
    model_args: str | None = Field(
        None,
        description="More for lm-eval's vLLM class and vLLM's engine: NAME=VALUE[,NAME=VALUE], such as "
        "gpu_memory_utilization=0.8,add_bos_token=true; or a JSON object.",
    )
    dtype: DType = _DTYPE
    trust_remote_code: bool = _TRUST

    @model_validator(mode="after")
    def _some_task(self) -> Self:
        if not self.names:
            raise ValueError(f"--tasks {self.tasks!r} names no task")
        if self.fewshot_as_multiturn is not None and not self.apply_chat_template:
            name = "fewshot-as-multiturn" if self.fewshot_as_multiturn else "no-fewshot-as-multiturn"
            raise ValueError(f"--{name} has no effect without --apply-chat-template")
        self.extra_model_args()
        return self

    @property
    def names(self) -> list[str]:
        """The tasks' names."""
        return [name.strip() for name in self.tasks.split(",") if name.strip()]

    def extra_model_args(self) -> dict[str, Any]:
        """``model_args`` by name.

        Raises:
            ValueError: not NAME=VALUE, a name given twice, or no JSON object.
        """
        text = (self.model_args or "").strip()
        if text.startswith("{"):
            try:
                found: dict[str, Any] = json.loads(text)
            except json.JSONDecodeError as err:
                raise ValueError(f"--model-args {text:.60}: no JSON object: {err}") from err
            return found
        found = {}
        for part in filter(None, text.split(",")):
            name, equals, value = part.partition("=")
            name = name.strip()
            if not equals or not name.isidentifier():
                raise ValueError(f"--model-args: expected NAME=VALUE[,NAME=VALUE] or a JSON object, found {part!r}")
            if name in found:
                raise ValueError(f"--model-args gives {name} twice")
            found[name] = _typed(value.strip())
        return found


def _typed(text: str) -> bool | int | float | str | None:
    """A value of ``--model-args``, read as lm-eval reads it: quotes make a string of anything."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    constants = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def one_kind(given: Collection[str]) -> Literal["text", "tasks"]:
    """Which of the two evaluations is asked for.

    Args:
        given: names of the options given, of either config.
    Raises:
        ConfigError: none or both, or an option has no effect with the one.
    """
    if ("text" in given) == ("tasks" in given):
        raise ConfigError("resmoe eval: give one of --text FILE (perplexity) and --tasks NAME[,NAME] (lm-eval)")
    kind: Literal["text", "tasks"] = "tasks" if "tasks" in given else "text"
    fields = (TasksConfig if kind == "tasks" else TextConfig).model_fields
    if idle := [name for name in given if name not in fields]:
        raise ConfigError(f"--{idle[0].replace('_', '-')} has no effect with --{kind}")
    return kind


def make_tasks_config(**options: object) -> TasksConfig:
    """Build a config from keyword options.

    Raises:
        ConfigError: names the option, the value found and the rule.
    """
    return validated(TasksConfig, options)
