"""`resmoe eval MODEL --tasks NAME`: lm-eval's tasks, run by lm-eval through its vLLM backend."""

import os
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

from compress_tools.errors import ConfigError
from compress_tools.evaluation.config import TasksConfig
from compress_tools.evaluation.source import (
    load_tokenizer,
    loading_options,
    read_model_config,
    stored_dtype,
    vllm_errors,
)

# Options that are arguments of lm-eval's vLLM class too.
_OWN_OPTIONS = ("dtype", "trust_remote_code", "max_model_len", "tensor_parallel_size")


def run_tasks(model: str, config: TasksConfig) -> dict[str, dict[str, Any]]:
    """Hand a checkpoint over to lm-eval.

    Args:
        model: checkpoint, dense or ResMoE.
        config: tasks, where their files lie, how they are asked, and what vLLM is told.
    Returns:
        for each task its metrics as lm-eval names them (``acc,none``, ``acc_stderr,none``), and ``n-shot``.
    Raises:
        ConfigError: lm-eval or vLLM is not installed; no such task, directory or argument; no chat template.
        CheckpointError: not a readable checkpoint, or vLLM could not run it.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("--tasks: lm-eval is not installed; pip install 'resmoe[eval]'")
    if find_spec("vllm") is None:
        raise ConfigError("--tasks: vLLM is not installed; pip install 'resmoe[cuda]', or see docs/install.md")
    model_config = read_model_config(model)
    if config.include_path is not None and not Path(config.include_path).is_dir():
        raise ConfigError(f"--include-path {config.include_path}: no such directory")
    model_args = merged_model_args(model, stored_dtype(config.dtype, model_config), config)
    loading = loading_options(trust_remote_code=config.trust_remote_code)
    if config.apply_chat_template and load_tokenizer(model, **loading).chat_template is None:
        raise ConfigError(f"--apply-chat-template: the tokenizer of {model} has no chat template; leave the option out")
    # The command's stdout is its result; vLLM logs there unless told otherwise.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=config.include_path)
    if unknown := sorted(set(config.names) - set(tasks.all_tasks)):
        raise ConfigError(
            f"--tasks: lm-eval knows no {', '.join(unknown)}; `lm-eval ls tasks` lists its own, --include-path adds "
            "those of a directory"
        )
    if config.model_args:
        _refuse_unknown(model_args)
    asked: dict[str, Any] = {"num_fewshot": config.num_fewshot, "apply_chat_template": config.apply_chat_template}
    if config.fewshot_as_multiturn is not None:  # lm-eval's own default changed between its versions
        asked["fewshot_as_multiturn"] = config.fewshot_as_multiturn
    with vllm_errors(model):
        found = simple_evaluate(
            model="vllm", model_args=model_args, tasks=config.names, task_manager=tasks, limit=config.limit, **asked
        )
    shots = found.get("n-shot", {})
    return {
        # Beside them lie the task's name and the number of its samples.
        task: {k: v for k, v in metrics.items() if "," in k} | ({"n-shot": shots[task]} if task in shots else {})
        for task, metrics in found["results"].items()
    }


def merged_model_args(model: str, dtype: str, config: TasksConfig) -> dict[str, Any]:
    """What lm-eval's vLLM class is made with: ours, then ``--model-args``.

    Args:
        model: the checkpoint.
        dtype: what it is stored in; ``--dtype`` where that was given.
        config: the request.
    Raises:
        ConfigError: ``--model-args`` says something else than MODEL or an option that was given.
    """
    more = config.extra_model_args()
    for name in ("pretrained", "model"):
        if more.pop(name, model) != model:
            raise ConfigError(f"--model-args: {name} is MODEL, {model}; leave it out")
    options = {name: getattr(config, name) for name in _OWN_OPTIONS if name in config.model_fields_set}
    if "max_length" in more:  # lm-eval's other name for it, and it refuses both
        if more.get("max_model_len", more["max_length"]) != more["max_length"]:
            raise ConfigError("--model-args: max_length and max_model_len are one thing; give one")
        more["max_model_len"] = more.pop("max_length")
    for name, value in options.items():
        if more.get(name, value) != value:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"--model-args: {name}={more[name]} contradicts {flag} {value}; give one of the two")
    loading = loading_options(trust_remote_code=config.trust_remote_code)
    ours = {name: value for name, value in options.items() if name in ("max_model_len", "tensor_parallel_size")}
    return {"pretrained": model, "dtype": dtype, **loading, **ours, **more}


def _refuse_unknown(model_args: dict[str, Any]) -> None:
    """What neither lm-eval's class nor vLLM's engine takes would end in a TypeError after minutes."""
    from lm_eval.models.vllm_causallms import VLLM

    # with the plugin: nothing here imports vLLM
    engine: set[str] = import_module("resmoe_vllm.evaluation").engine_arguments()
    known = {*signature(VLLM.__init__).parameters, *engine}
    if unknown := sorted(set(model_args) - (known - {"self", "kwargs"})):
        raise ConfigError(
            f"--model-args: neither lm-eval's vLLM class nor vLLM's engine knows {', '.join(unknown)}; the "
            "engine's names are those of `vllm serve --help` with _ for -"
        )
