"""The options of `python -m benchmarks.serve`."""

import math
from pathlib import Path

import pytest

from benchmarks import serve
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
