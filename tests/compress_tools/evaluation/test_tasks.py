"""What lm-eval is handed and what is kept of its answer, and how a tokenizer is asked; both stood in for."""

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from compress_tools.cli.commands import cli
from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.evaluation import tasks
from compress_tools.evaluation.config import make_tasks_config
from compress_tools.evaluation.predictions import Predictions, kl_divergence
from compress_tools.evaluation.source import read_tokens
from compress_tools.evaluation.tasks import run_tasks


class _VLLMClass:
    """Takes what lm-eval's class takes by name, and hands the rest to the engine."""

    def __init__(self, pretrained: str, add_bos_token: bool | None = None, **kwargs: Any) -> None:
        raise AssertionError("lm-eval makes it, not we")


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
        shots = {} if asked["num_fewshot"] is None else {"n-shot": dict.fromkeys(asked["tasks"], asked["num_fewshot"])}
        return {"results": dict.fromkeys(asked["tasks"], metrics), "configs": {}, **shots}

    package, module = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    package.simple_evaluate, module.TaskManager = simple_evaluate, TaskManager
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", module)
    vllm_class = ModuleType("lm_eval.models.vllm_causallms")
    vllm_class.VLLM = _VLLMClass
    monkeypatch.setitem(sys.modules, "lm_eval.models", ModuleType("lm_eval.models"))
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", vllm_class)
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


def asked_for(noted: SimpleNamespace, **options: Any) -> dict[str, Any]:
    """What the stand-in is asked, of options of `resmoe eval --tasks one`."""
    run_tasks("model", make_tasks_config(tasks="one", **options))
    return noted.asked


def test_how_tasks_are_asked_reaches_lm_eval(lm_eval: SimpleNamespace, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "mine")
    monkeypatch.setattr(tasks, "load_tokenizer", lambda path: SimpleNamespace(chat_template="{{ messages }}"))
    plain = asked_for(lm_eval)
    assert (plain["num_fewshot"], plain["apply_chat_template"]) == (None, False)
    assert "fewshot_as_multiturn" not in plain
    shots = asked_for(lm_eval, num_fewshot=0, apply_chat_template=True)
    assert (shots["num_fewshot"], shots["apply_chat_template"]) == (0, True)
    assert "fewshot_as_multiturn" not in shots
    for turns in (True, False):
        asked = asked_for(lm_eval, apply_chat_template=True, fewshot_as_multiturn=turns)
        assert asked["fewshot_as_multiturn"] is turns
    found = run_tasks("model", make_tasks_config(tasks="one", num_fewshot=3))
    assert found == {"one": {"acc,none": 0.5, "acc_stderr,none": 0.1, "n-shot": 3}}


def test_a_chat_template_that_is_not_there_is_named_before_the_engine_starts(lm_eval, monkeypatch) -> None:
    monkeypatch.setattr(tasks, "load_tokenizer", lambda path: SimpleNamespace(chat_template=None))
    with pytest.raises(ConfigError, match="--apply-chat-template: the tokenizer of model has no chat template"):
        asked_for(lm_eval, apply_chat_template=True)
    assert lm_eval.asked is None


def test_what_vllm_is_told_reaches_lm_eval(lm_eval: SimpleNamespace, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "mine")
    ours = {"pretrained": "model", "dtype": "bfloat16"}
    assert asked_for(lm_eval, max_model_len=512)["model_args"] == {**ours, "max_model_len": 512}
    assert asked_for(lm_eval, tensor_parallel_size=2)["model_args"] == {**ours, "tensor_parallel_size": 2}
    given = "gpu_memory_utilization=0.5, add_bos_token=True,seed=-7,revision='123',load_format=dummy,hf_token=none"
    more = {
        "gpu_memory_utilization": 0.5,
        "add_bos_token": True,
        "seed": -7,
        "revision": "123",
        "load_format": "dummy",
        "hf_token": None,
    }
    assert asked_for(lm_eval, model_args=given)["model_args"] == {**ours, **more}
    nested = '{"max_num_seqs": 4, "hf_overrides": {"a": [1, 2]}}'
    assert asked_for(lm_eval, model_args=nested)["model_args"] == {
        **ours,
        "max_num_seqs": 4,
        "hf_overrides": {"a": [1, 2]},
    }


def test_model_args_go_over_ours_where_no_option_says_otherwise(lm_eval: SimpleNamespace, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "mine")
    assert asked_for(lm_eval, model_args="dtype=float16")["model_args"]["dtype"] == "float16"
    same = asked_for(
        lm_eval, dtype="float16", max_model_len=9, model_args="dtype=float16,max_length=9,pretrained=model"
    )
    assert same["model_args"] == {"pretrained": "model", "dtype": "float16", "max_model_len": 9}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_args": "pretrained=other"}, "pretrained is MODEL, model; leave it out"),
        ({"model_args": "model=other"}, "model is MODEL, model; leave it out"),
        ({"model_args": "dtype=float32", "dtype": "float16"}, "dtype=float32 contradicts --dtype float16"),
        ({"model_args": "max_model_len=8", "max_model_len": 9}, "max_model_len=8 contradicts --max-model-len 9"),
        ({"model_args": "max_length=8", "max_model_len": 9}, "max_model_len=8 contradicts --max-model-len 9"),
        ({"model_args": "max_length=8,max_model_len=9"}, "max_length and max_model_len are one thing"),
        ({"model_args": "tensor_parallel_size=2", "tensor_parallel_size": 4}, "contradicts --tensor-parallel-size 4"),
        ({"model_args": "trust_remote_code=false", "trust_remote_code": True}, "contradicts --trust-remote-code"),
        ({"model_args": "gpu_memory=1,seed=1,add_bos=1"}, "engine knows add_bos, gpu_memory;"),
        ({"model_args": "seed"}, "expected NAME=VALUE"),
        ({"model_args": "=3"}, "expected NAME=VALUE"),
        ({"model_args": "seed=1,seed=2"}, "gives seed twice"),
        ({"model_args": '{"seed": 1'}, "no JSON object"),
        ({"fewshot_as_multiturn": True}, "--fewshot-as-multiturn has no effect without --apply-chat-template"),
        ({"fewshot_as_multiturn": False}, "--no-fewshot-as-multiturn has no effect without"),
        ({"num_fewshot": -1}, "--num-fewshot"),
        ({"max_model_len": 0}, "--max-model-len"),
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size"),
    ],
    ids=str,
)
def test_what_contradicts_or_is_unknown_is_refused(lm_eval: SimpleNamespace, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asked_for(lm_eval, **options)
    assert lm_eval.asked is None


def test_a_flag_that_may_be_left_to_lm_eval_has_a_no(lm_eval: SimpleNamespace, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "mine")
    monkeypatch.setattr(tasks, "load_tokenizer", lambda path: SimpleNamespace(chat_template="x"))
    words = ["eval", "model", "--tasks", "one", "--json", "--apply-chat-template"]
    for flag, wanted in (("--fewshot-as-multiturn", True), ("--no-fewshot-as-multiturn", False)):
        CliRunner().invoke(cli, [*words, flag], catch_exceptions=False)
        assert lm_eval.asked["fewshot_as_multiturn"] is wanted


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
