"""The options of `python -m benchmarks.serve`."""

import math
from pathlib import Path

import pytest

from benchmarks import serve
from benchmarks.harness.rows import Row
from benchmarks.serving.bench_client import Load


@pytest.mark.parametrize("text", ["name", "=dir", "name=no/such/dir"])
def test_model_option_must_name_a_directory(text: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        serve.parse(["--model", text])
    assert "NAME=DIR" in capsys.readouterr().err


def test_models_are_repeatable_and_rates_may_be_infinite(tmp_path: Path):
    args = serve.parse(["--model", f"a={tmp_path}", "--model", f"b={tmp_path}", "--rates", "0.5", "inf"])
    assert dict(args.model) == {"a": tmp_path, "b": tmp_path}
    assert args.rates == [0.5, math.inf]


def test_loads_are_told_apart_in_words():
    loads = [Load(math.inf, 8, 16, 16), Load(2, 8, 16, 16), Load(2, 8, 16, 16, max_concurrency=4)]
    assert len({str(load) for load in loads}) == 3


def test_lengths_beyond_the_context_are_refused(tiny_mixtral: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--model", f"small={tiny_mixtral}", "--input-len", "100", "--output-len", "29"]
    assert serve.main(options) == 2
    assert "129 tokens together, its context holds 128" in capsys.readouterr().err


def test_models_are_compared_with_the_first():
    def measured(model: str, tpot: float, resident: float, load: float) -> list[Row]:
        context = {"model": model, "max_concurrency": 1}
        return [
            Row(f"{model}: tpot", tpot, "ms", context={**context, "metric": "median TPOT at all at once"}),
            Row(f"{model}: bytes", resident, "MiB", context={**context, "metric": serve.RESIDENT}),
            Row(f"{model}: load", load, "s", context={**context, "metric": serve.WEIGHT_LOAD}),
        ]

    rows = measured("original", 30, 100, 4) + measured("small", 15, 50, 2)
    speed, memory, load = serve.compare(rows, ["original", "small"], targets=True)
    assert (speed.value, speed.target, speed.met) == (2, 1.5, True)
    assert (memory.value, memory.target, memory.met) == (0.5, 0.4, False)
    assert (load.value, load.met) == (0.5, True)
    assert all(row.target is None for row in serve.compare(rows, ["original", "small"], targets=False))
