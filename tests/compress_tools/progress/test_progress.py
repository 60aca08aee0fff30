"""What a person sees of a run: time left from what was measured, lines under nohup, a live table, one log file."""

import io
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from compress_tools.config import make_config
from compress_tools.errors import NumericalError
from compress_tools.output.staging import Staging
from compress_tools.pipeline import compress, compress_slice
from compress_tools.progress.eta import Eta
from compress_tools.progress.listener import ProgressListener, Silent, Together
from compress_tools.progress.live import ROWS_SHOWN, LiveProgress
from compress_tools.progress.log import STEPS_EVERY_S, LogProgress, logged
from compress_tools.progress.text import human_s
from compress_tools.report import LayerReport
from compress_tools.slices.slices import Slice

QUICK = make_config(center="mean", workers=1)
LAYER = LayerReport(0, 1.0, 0.25, 0.5, 1000, 400, "mean", [1.0], 0.0)


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def one_layer(progress: ProgressListener, clock: FakeClock, layer: int, seconds: tuple[float, float]) -> None:
    for stage, taken in zip(("reading", "center"), seconds, strict=True):
        progress.stage(stage, 3, layer)
        clock.now += taken
    progress.layer_done(replace(LAYER, layer=layer), {"read": seconds[0], "center": seconds[1]})
    progress.shard_done()


def test_time_left_is_measured_on_layers() -> None:
    clock = FakeClock()
    eta = Eta(clock)
    eta.start(5)
    eta.stage("copying other tensors")
    clock.now += 1
    eta.shard_done()
    assert (eta.whole_s, eta.stage_s) == (None, None)
    # A layer that an earlier run wrote takes no time and must not be measured.
    eta.layer_done()
    eta.shard_done()
    assert eta.whole_s is None
    eta.stage("reading")
    clock.now += 10
    eta.stage("center")
    clock.now += 50
    eta.layer_done()
    eta.shard_done()
    assert eta.whole_s == 120
    eta.stage("reading")
    clock.now += 4
    assert (eta.stage_s, eta.whole_s) == (6, 116)
    eta.stage("center")
    clock.now += 80
    assert (eta.stage_s, eta.whole_s) == (0, 36)


def test_units_other_than_shards_are_alike() -> None:
    clock = FakeClock()
    eta = Eta(clock)
    eta.start(4, "file")
    for seconds in (10, 20):
        eta.stage("reading")
        clock.now += seconds
        eta.shard_done()
    assert eta.whole_s == 30


@pytest.mark.parametrize(("seconds", "text"), [(None, "?"), (0.4, "0:00"), (61, "1:01"), (3725, "1:02:05")])
def test_seconds_for_people(seconds: float | None, text: str) -> None:
    assert human_s(seconds) == text


def test_lines_with_time_left(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    progress = LogProgress(clock)
    with caplog.at_level(logging.INFO, logger="compress_tools"):
        progress.start(3)
        one_layer(progress, clock, 0, (10, 50))
        progress.stage("center", None, 1)
        for _ in range(5):
            clock.now += STEPS_EVERY_S / 4
            progress.step()
    assert caplog.messages == [
        "3 shards to go",
        "layer 0: reading",
        "layer 0: center",
        "layer 0 done: relative error 0.250000, 1 kB to 400 B (0.400); read 10.00 s, center 50.00 s",
        "shard 1 of 3 done (left: all 2:00)",
        "layer 1: center (left: stage 0:50, all 2:00)",
        "layer 1: center: step 4 (left: stage 0:00, all 1:00)",
    ]


def test_live_table_and_bars() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=120, height=50)
    clock = FakeClock()
    with LiveProgress(screen) as progress:
        progress.start(ROWS_SHOWN + 2)
        for layer in range(ROWS_SHOWN + 1):
            one_layer(progress, clock, layer, (1, 2))
        progress.stage("reading", 8, 13)
        progress.step()
        progress.say("[a remark]")
        with screen.capture() as capture:
            screen.print(progress.renderable())
    shown = capture.get()
    assert "relative error" in shown
    assert f"│ {ROWS_SHOWN} " in shown
    assert "│ 0 " not in shown
    assert f"{ROWS_SHOWN + 1}/{ROWS_SHOWN + 2}" in shown
    assert "1/8" in shown
    assert "left" in shown
    assert "[a remark]" in screen.file.getvalue()


def test_together_passes_everything_on() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[str] = []

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_: self.seen.append(name)

    listeners = (Recorder(), Recorder())
    both = Together(*listeners)
    both.start(1)
    both.stage("a", None)
    both.step()
    both.layer_done(LAYER, {})
    both.shard_done()
    both.say("x")
    for listener in listeners:
        assert listener.seen == ["start", "stage", "step", "layer_done", "shard_done", "say"]


def test_under_nohup_every_stage_is_a_line_and_in_the_log(tiny_olmoe: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "compress_tools", "compress", str(tiny_olmoe), str(tmp_path / "small")]
    done = subprocess.run([*words, "--method", "prune", "--center", "mean"], capture_output=True, text=True, check=True)
    lines = [line.split(" INFO ")[1].split(" (left")[0] for line in done.stderr.splitlines()]
    for layer in (0, 1):
        for stage in ("reading", "center", "residuals", "writing"):
            assert f"layer {layer}: {stage}" in lines
        assert any(line.startswith(f"layer {layer} done: relative error 0.") for line in lines)
    assert "(left: all 0:0" in done.stderr
    assert (tmp_path / "small.log").read_text() == done.stderr
    assert not list((tmp_path / "small").glob("*.log"))


class FailInLayerOne(Silent):
    def stage(self, text: str, total: int | None, layer: int | None = None) -> None:
        if layer == 1:
            raise NumericalError("made up")


def test_one_log_over_resumed_runs_with_the_error(tiny_olmoe: Path, tmp_path: Path) -> None:
    target = tmp_path / "small"
    with pytest.raises(NumericalError), logged(Staging(target).log_path, to_stderr=False) as lines:
        compress(tiny_olmoe, target, QUICK, progress=Together(lines, FailInLayerOne()))
    with logged(Staging(target).log_path, to_stderr=False) as lines:
        compress(tiny_olmoe, target, QUICK, resume=True, progress=lines)
    log = Staging(target).log_path.read_text()
    assert log.index("layer 0 done") < log.index("ERROR stopped\nTraceback") < log.index("NumericalError: made up")
    assert log.index("made up") < log.index("resuming: 2 of 3 shards are written") < log.index("layer 1 done")
    assert log.count("layer 0: reading") == 1
    assert not logging.getLogger("compress_tools").handlers


def test_a_refused_request_leaves_no_log(tiny_olmoe: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "file").touch()
    with pytest.raises(ValueError), logged(Staging(tmp_path / "new").log_path, to_stderr=False) as lines:
        compress_slice(tiny_olmoe, tmp_path / "new", QUICK, Slice(1, 9), progress=lines)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert not Staging(tmp_path / "new").path.exists()
