"""What lm-eval is handed and what is kept of its answer, and how a tokenizer is asked; both stood in for."""

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.evaluation import tasks
from compress_tools.evaluation.config import make_tasks_config
from compress_tools.evaluation.predictions import Predictions, kl_divergence
from compress_tools.evaluation.source import read_tokens
from compress_tools.evaluation.tasks import run_tasks


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in that knows two tasks, notes what it is asked, and answers as lm-eval does."""
    noted = SimpleNamespace(include_path=None, asked=None, fails=None)

    class TaskManager:
        def __init__(self, include_path: str | None) -> None:
            noted.include_path = include_path
            self.all_tasks = ["one", "two"]

    def simple_evaluate(**asked: Any) -> dict[str, Any]:
        noted.asked = asked
        if noted.fails is not None:
            raise noted.fails
        metrics = {"alias": "one", "samples": 3, "acc,none": 0.5, "acc_stderr,none": 0.1}
        return {"results": dict.fromkeys(asked["tasks"], metrics), "configs": {}}

    package, module = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    package.simple_evaluate, module.TaskManager = simple_evaluate, TaskManager
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", module)
    monkeypatch.setattr(tasks, "find_spec", lambda name: object())
    monkeypatch.setattr(tasks, "read_model_config", lambda path: {"dtype": "bfloat16"})
    monkeypatch.delenv("VLLM_LOGGING_STREAM", raising=False)
    return noted


def test_lm_eval_is_asked_for_the_tasks_and_its_metrics_are_kept(
    lm_eval: SimpleNamespace, tmp_path, monkeypatch
) -> None:
    found = run_tasks("model", make_tasks_config(tasks="two,one", limit=7, include_path=str(tmp_path)))
    metrics = {"acc,none": 0.5, "acc_stderr,none": 0.1}
    assert found == {"two": metrics, "one": metrics}
    assert lm_eval.include_path == str(tmp_path)
    asked = lm_eval.asked
    assert (asked["model"], asked["tasks"], asked["limit"]) == ("vllm", ["two", "one"], 7)
    assert asked["model_args"] == {"pretrained": "model", "dtype": "bfloat16"}
    assert asked["task_manager"].all_tasks == ["one", "two"]
    assert os.environ.pop("VLLM_LOGGING_STREAM") == "ext://sys.stderr"
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "mine")
    run_tasks("model", make_tasks_config(tasks="one", dtype="float16"))
    assert lm_eval.asked["model_args"] == {"pretrained": "model", "dtype": "float16"}
    run_tasks("model", make_tasks_config(tasks="one", dtype="float16", trust_remote_code=True))
    assert lm_eval.asked["model_args"]["trust_remote_code"] is True
    assert (lm_eval.include_path, lm_eval.asked["limit"], os.environ["VLLM_LOGGING_STREAM"]) == (None, None, "mine")


def test_unknown_tasks_are_named_in_order(lm_eval: SimpleNamespace, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "mine")
    with pytest.raises(ConfigError, match="lm-eval knows no alpha, beta, gamma, zeta;"):
        run_tasks("model", make_tasks_config(tasks="zeta,one,gamma,alpha,beta"))
    assert lm_eval.asked is None


def test_what_stops_lm_eval_is_a_sentence(lm_eval: SimpleNamespace, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "mine")
    lm_eval.fails = RuntimeError("no memory")
    with pytest.raises(CheckpointError, match="model: vLLM could not run it: no memory"):
        run_tasks("model", make_tasks_config(tasks="one"))


def test_a_text_gets_no_special_token(trained, monkeypatch) -> None:
    import transformers

    def tokenizer(text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert text
        assert not add_special_tokens
        assert not verbose
        return {"input_ids": [5, 6, 7]}

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path: tokenizer)
    assert read_tokens(str(trained[0]), str(trained[0] / "heldout.txt"), None).tolist() == [5, 6, 7]


def test_a_list_against_a_whole_vocabulary_is_refused_either_way() -> None:
    logprobs = torch.full((1, 2), 0.5).log()
    whole = Predictions(logprobs[:, 0], logprobs)
    listed = Predictions(logprobs[:, 0], logprobs, torch.tensor([[0, 1]]))
    for one, other in ((whole, listed), (listed, whole)):
        with pytest.raises(ValueError, match="whole vocabulary against"):
            kl_divergence(one, other)
