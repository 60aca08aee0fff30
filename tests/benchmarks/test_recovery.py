"""What `make recovery` makes of two scores, what it asks, and when it asks anew; lm-eval is not needed."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from benchmarks.recovery import __main__ as recovery
from benchmarks.recovery.questions import BEFORE, QUESTIONS, best_constant, questions


@pytest.mark.parametrize(
    ("base", "kept", "passed"),
    [(0.6, 0.6, True), (0.6, 0.57, True), (0.6, 0.5699, False), (0.6, 0.05, False), (0.6, 0.7, True)],
)
def test_the_gate_is_a_share_of_the_original_score(base: float, kept: float, passed: bool):
    found, sentence = recovery.Kept(base, kept, constant=0.05, asked=2000).verdict()
    assert found is passed
    assert sentence.startswith("passed" if passed else "FAILED")
    for number in (f"{base:.4f}", f"{kept:.4f}", f"{kept / base:.3f}", "0.0500", "0.95", "2000"):
        assert number in sentence


@pytest.mark.parametrize(
    ("base", "asked", "says"), [(0.05, 2000, False), (0.064, 2000, False), (0.065, 2000, True), (0.065, 200, False)]
)
def test_an_original_no_better_than_a_constant_answer_says_nothing(base: float, asked: int, says: bool):
    """Three standard errors of 0.05 are 0.0146 with 2000 questions, 0.046 with 200."""
    passed, sentence = recovery.Kept(base, base, 0.05, asked).verdict()
    assert passed is says
    assert ("may know no more than that" in sentence) is not says


def test_questions_are_of_the_text_and_the_same_each_time():
    draw = random.Random(1)
    text = " ".join("".join(draw.choices("abcdefgh", k=draw.randint(1, 9))) for _ in range(4000))
    made = questions(text)
    assert made == questions(text)
    assert len({question["context"] for question in made}) == QUESTIONS
    for question in made:
        assert len(question["context"]) == BEFORE
        assert re.fullmatch(" [a-h]{2,}", question["word"])
        assert question["context"] + question["word"] + " " in text + " "


def test_the_best_constant_answer_is_the_commonest_word():
    words = [" the", " of", " the", " self", " the"]
    assert best_constant([{"context": "", "word": word} for word in words]) == 0.6


def test_the_questions_of_held_out_code_fit_the_context():
    made = questions()
    assert len(made) == QUESTIONS
    assert max(len((question["context"] + question["word"]).encode()) for question in made) <= 256
    assert best_constant(made) < 0.1


def test_the_task_file_names_its_questions():
    task = yaml.safe_load((recovery.TASKS / f"{recovery.TASK}.yaml").read_text().replace("!function ", ""))
    assert task["task"] == recovery.TASK
    module, function = task["custom_dataset"].split(".")
    assert f"def {function}(" in (recovery.TASKS / f"{module}.py").read_text()
    assert [task[f"doc_to_{part}"] for part in ("text", "target")] == ["{{context}}", "{{word}}"]
    assert [f"{metric['metric']},none" for metric in task["metric_list"]] == [recovery.METRIC]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"x": np.zeros(4, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The models that were asked; each answers 0.6 of the questions rightly, a compressed one 0.5."""
    found: list[Path] = []
    monkeypatch.setattr(recovery, "version", lambda name: "1")
    monkeypatch.setattr(recovery, "find_spec", lambda name: True)
    monkeypatch.setattr(recovery, "score", lambda model, limit: found.append(model) or (0.5 if len(found) > 1 else 0.6))
    return found


def test_the_original_is_asked_anew_only_where_it_changed(model: Path, asked: list[Path], tmp_path: Path):
    cache = tmp_path / "base.json"
    assert recovery.cached_score(model, None, cache) == (0.6, False)
    assert recovery.cached_score(model, None, cache) == (0.6, True)
    assert recovery.cached_score(model, 10, cache) == (0.5, False)
    save_file({"x": np.ones(4, np.float32)}, model / "model.safetensors")
    assert recovery.cached_score(model, None, cache) == (0.5, False)
    assert asked == [model] * 3
    assert len(json.loads(cache.read_text())) == 3


@pytest.mark.parametrize(("least", "code"), [("0.8", 0), ("0.95", 1)])
def test_exit_code_and_sentence(
    model: Path, asked: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], least: str, code: int
):
    words = ["--original", str(model), "--compressed", str(model), "--least", least, "--out", str(tmp_path / "out")]
    assert recovery.main(words) == code
    assert "original 0.6000, compressed 0.5000" in capsys.readouterr().out
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--least", "1.5"], "--least 1.5: must be above 0 and at most 1"),
        (["--least", "nan"], "--least nan: must be above 0"),
        (["--limit", "0"], "--limit 0: must be from 1 to 2000"),
        (["--compressed", "x"], "--compressed: give --original too"),
    ],
)
def test_wrong_arguments(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        recovery.main(words)
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err


def test_no_checkpoint_no_lm_eval_or_a_broken_cache_is_a_sentence(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert recovery.main(["--original", str(tmp_path / "none")]) == 1
    assert "none: found no weights" in capsys.readouterr().err
    monkeypatch.setattr(recovery, "find_spec", lambda name: None)
    assert recovery.main(["--original", str(model)]) == 1
    assert "lm-eval is not installed" in capsys.readouterr().err
    monkeypatch.setattr(recovery, "find_spec", lambda name: True)
    (tmp_path / "base.json").write_text("[1]")
    assert recovery.main(["--original", str(model), "--compressed", str(model), "--out", str(tmp_path)]) == 1
    assert "base.json: expected scores by fingerprint" in capsys.readouterr().err
