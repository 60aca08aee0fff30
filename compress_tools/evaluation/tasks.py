"""`resmoe eval MODEL --tasks NAME`: lm-eval's tasks, run by lm-eval through its vLLM backend."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress_tools.errors import ConfigError
from compress_tools.evaluation.config import TasksConfig
from compress_tools.evaluation.source import loading_options, read_model_config, stored_dtype, vllm_errors


def run_tasks(model: str, config: TasksConfig) -> dict[str, dict[str, Any]]:
    """Hand a checkpoint over to lm-eval.

    Args:
        model: checkpoint, dense or ResMoE.
        config: tasks and where their files lie.
    Returns:
        for each task its metrics as lm-eval names them (``acc,none``, ``acc_stderr,none``).
    Raises:
        ConfigError: lm-eval or vLLM is not installed; no such task or directory.
        CheckpointError: not a readable checkpoint, or vLLM could not run it.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("--tasks: lm-eval is not installed; pip install 'resmoe[eval]'")
    if find_spec("vllm") is None:
        raise ConfigError("--tasks: vLLM is not installed; pip install 'resmoe[cuda]', or see docs/install.md")
    model_config = read_model_config(model)
    if config.include_path is not None and not Path(config.include_path).is_dir():
        raise ConfigError(f"--include-path {config.include_path}: no such directory")
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
    loading = loading_options(trust_remote_code=config.trust_remote_code)
    with vllm_errors(model):
        found = simple_evaluate(
            model="vllm",
            model_args={"pretrained": model, "dtype": stored_dtype(config.dtype, model_config), **loading},
            tasks=config.names,
            task_manager=tasks,
            limit=config.limit,
        )
    # Beside them lie the task's name and the number of its samples.
    return {task: {k: v for k, v in metrics.items() if "," in k} for task, metrics in found["results"].items()}
