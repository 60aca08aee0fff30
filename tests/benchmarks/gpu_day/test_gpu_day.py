"""The day on a GPU: its order, its limits, what it keeps, and a rehearsal on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_day import __main__ as day
from benchmarks.gpu_day import steps as step_command
from benchmarks.gpu_day.plan import MINUTES, STEPS, Step
from benchmarks.gpu_day.steps import RUN, Records, relative_deviation
from benchmarks.harness.environment import REPO
from benchmarks.harness.rows import Row

COUNTED = "import pathlib, sys; file = pathlib.Path({file!r}); file.write_text(file.read_text() + 'x'); {then}"


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``steps(name=(code, vital, seconds), ...)`` makes them the day's; each counts its runs in a file of its name."""

    def make(**wanted: tuple[str, bool, float]) -> None:
        for name in wanted:
            (tmp_path / name).write_text("")

        class Scripted(Step):
            def command(self, folder: str, *, rehearse: bool) -> list[str]:
                code = COUNTED.format(file=str(tmp_path / self.name), then=wanted[self.name][0])
                return [sys.executable, "-c", code]

        made = tuple(Scripted(name, seconds, "why", vital) for name, (_, vital, seconds) in wanted.items())
        monkeypatch.setattr(day, "STEPS", made)

    return make


def go(tmp_path: Path, *more: str) -> int:
    return day.main(["--rehearse", "--folder", str(tmp_path / "day"), *more])


def runs(tmp_path: Path, *names: str) -> list[int]:
    return [len((tmp_path / name).read_text()) for name in names]


def test_limits_fit_the_visit() -> None:
    assert sum(step.seconds for step in STEPS) <= 60 * MINUTES
    assert {step.name for step in STEPS} < set(RUN)


def test_it_goes_on_where_it_stopped(tmp_path: Path, steps, capsys: pytest.CaptureFixture[str]) -> None:
    steps(first=("", True, 30), second=("sys.exit(5)", False, 30), third=("sys.exit(4)", False, 30))
    assert go(tmp_path) == 3
    assert "second: failed, exit code 5" in capsys.readouterr().out
    steps_of = json.loads((tmp_path / "day" / "state.json").read_text())["steps"]
    assert [steps_of[name]["became"] for name in ("first", "third")] == ["done", "not possible here"]
    assert go(tmp_path) == 3
    assert runs(tmp_path, "first", "second", "third") == [1, 2, 1]
    assert go(tmp_path, "--again") == 3
    assert runs(tmp_path, "first", "second", "third") == [2, 3, 2]


def test_the_first_wrong_result_ends_it(tmp_path: Path, steps) -> None:
    steps(first=("print('the proof'); sys.exit(9)", False, 30), second=("", False, 30))
    assert go(tmp_path) == 1
    assert runs(tmp_path, "first", "second") == [1, 0]
    assert "the proof" in (tmp_path / "day" / "first.log").read_text()


def test_nothing_is_tried_without_what_is_vital(tmp_path: Path, steps) -> None:
    steps(first=("sys.exit(1)", True, 30), second=("", False, 30))
    assert go(tmp_path) == 3
    assert runs(tmp_path, "second") == [0]


def test_a_step_that_takes_too_long_is_ended_and_its_rows_stay(tmp_path: Path, steps) -> None:
    row = json.dumps({"name": "measured"})
    (tmp_path / "day").mkdir()
    write = f"open({str(tmp_path / 'day' / 'first.jsonl')!r}, 'w').write({row + chr(10) + row[:5]!r})"
    steps(first=(f"{write}; import time; time.sleep(60)", False, 2), second=("", False, 30))
    assert go(tmp_path) == 3
    state = json.loads((tmp_path / "day" / "state.json").read_text())
    assert state["steps"]["first"]["became"] == "out of time after 2 s"
    assert state["steps"]["second"]["became"] == "done"
    assert json.loads((tmp_path / "day" / "rows.json").read_text()) == {"rows": [{"name": "measured"}]}


def test_what_does_not_fit_the_visit_is_left(tmp_path: Path, steps) -> None:
    steps(first=("", False, 30))
    assert go(tmp_path, "--minutes", "0.1") == 3
    assert runs(tmp_path, "first") == [0]


def test_other_code_begins_anew(tmp_path: Path, steps, monkeypatch: pytest.MonkeyPatch) -> None:
    steps(first=("", False, 30))
    assert go(tmp_path) == 0
    monkeypatch.setattr(day, "sources_hash", lambda: "others")
    assert go(tmp_path) == 0
    assert runs(tmp_path, "first") == [2]


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(day, "collect_environment", lambda: type("Here", (), {"gpu": None}))
    assert day.main(["--folder", str(tmp_path)]) == 2
    assert "--rehearse" in capsys.readouterr().err


def test_wrong_arguments_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(step_command, "collect_environment", lambda: type("Here", (), {"gpu": None}))
    assert step_command.main(["profile", "--folder", str(tmp_path)]) == 2
    assert "no GPU here; --rehearse" in capsys.readouterr().err
    for given, sentence in (
        (
            ("correctness", "--folder", str(tmp_path), "--rehearse", "--method", "none"),
            "--method none: expected one of",
        ),
        (("profile", "--folder", str(Path(__file__)), "--rehearse"), "test_gpu_day.py: File exists"),
    ):
        with pytest.raises(SystemExit) as ended:
            step_command.main(list(given))
        assert ended.value.code == 2
        assert sentence in capsys.readouterr().err


def test_rows_of_a_rehearsal_say_so(tmp_path: Path) -> None:
    records = Records(tmp_path, "profile", rehearse=True)
    records.add(Row("kernel", 3.5, "us a call", context={"launches": 1}))
    (line,) = records.file.read_text().splitlines()
    row = json.loads(line)
    assert (row["rehearsal"], row["step"], row["launches"]) == (True, "profile", 1)
    assert records.done() == {"kernel"}


def test_deviation_of_logprobs() -> None:
    twin = [-1.0, -3.0, -5.0, -7.0]
    assert relative_deviation(twin, twin) == 0
    assert relative_deviation([value + 1 for value in twin], twin) == pytest.approx(1 / 5**0.5)
    assert relative_deviation(twin[:3], twin) == 1e9
    assert relative_deviation([float("nan"), *twin[1:]], twin) == 1e9


def rehearse(folder: Path, *names: str) -> list[dict]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_day", "--rehearse", "--folder", str(folder)]
    done = subprocess.run(
        [*command, "--only", *names], cwd=REPO, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((folder / "rows.json").read_text())["rows"]
    assert all(row["rehearsal"] for row in rows)
    return rows


@pytest.mark.slow
def test_rehearsal_of_the_kernels(tmp_path: Path) -> None:
    rows = rehearse(tmp_path, "environment", "sanitizer", "correctness", "profile", "kernels")
    found = {row["name"]: row for row in rows}
    assert found["a first kernel runs"]["value"] == "right"
    assert found["small check"]["value"] == "right"
    errors = [row for row in rows if row["name"].endswith(": error")]
    assert len(errors) == 2
    assert all(row["met"] for row in errors)
    assert {row["step"] for row in rows} == {"environment", "sanitizer", "correctness", "profile", "kernels"}
