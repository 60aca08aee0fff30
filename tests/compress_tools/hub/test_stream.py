"""--stream: never more than the shards of one layer, each fetched once, whatever the run is killed at."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from compress_tools.config import make_config
from compress_tools.errors import CheckpointError
from compress_tools.hub.files import HubFiles, source_files
from compress_tools.hub.own_folder import MARKER_NAME, OwnFolder
from compress_tools.hub.repository import open_repository
from compress_tools.output.target import make_target
from compress_tools.pipeline import compress
from compress_tools.planner.budget import plan_for_budget
from compress_tools.planner.config import make_planner_config
from compress_tools.progress.listener import Silent
from compress_tools.report import LayerReport
from compress_tools.source.source_reader import SourceReader
from tests.compress_tools.hub.conftest import NAME, Resmoe, environment
from tests.compress_tools.hub.test_hub_source import weights_of
from tests.compress_tools.source.test_source_reader import fp8_blocks, int4_groups, twins
from tests.hub_server.repository import Repository, files_of
from tests.hub_server.server import HubServer

QUICK = make_config(center="mean", workers=1)
OPTIONS = ("--method", "prune", "--center", "mean", "--workers", "1", "--stream")


def layer_shards(model: Path) -> dict[int, set[str]]:
    """The weight files of each layer's experts."""
    source = make_target(SourceReader(model), QUICK).source
    return {layer: set(source.reader.shards_of(source.expected(layer))) for layer in source.layers}


def disk_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, half-fetched ones included."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors")) + sum(
        file.stat().st_size for file in folder.rglob("*.incomplete")
    )


class Watching(Silent):
    """Looks at each event.

    Args:
        look: called then.
        stop_after: layers, after which the run is interrupted; 0: none.
    """

    def __init__(self, look: Callable[[], None] = lambda: None, stop_after: int = 0) -> None:
        self.said: list[str] = []
        self._look, self._left = look, stop_after

    def stage(self, text: str, total: int | None, layer: int | None = None) -> None:
        self._look()

    def step(self) -> None:
        self._look()

    def layer_done(self, report: LayerReport, seconds: dict[str, float]) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt

    def say(self, text: str) -> None:
        self.said.append(text)


def streamed(dst: Path, progress: Silent | None = None, revision: str | None = None, **options: bool) -> None:
    """What `resmoe compress NAME DST --stream` does."""
    told = progress or Silent()
    with source_files(NAME, revision, dst.with_name(dst.name + ".source"), told) as source:
        compress(source, dst, QUICK, progress=told, **options)


def test_the_disk_holds_the_shards_of_one_layer(
    hub: HubServer, mixtral: Repository, tiny_mixtral: Path, tmp_path: Path
) -> None:
    compress(tiny_mixtral, tmp_path / "here", QUICK)
    peaks: list[int] = []
    folder = tmp_path / "small.source"

    def look(path: str = "") -> None:
        peaks.append(disk_bytes(folder))

    hub.on_request = look
    streamed(tmp_path / "small", Watching(look))
    assert weights_of(tmp_path / "small") == weights_of(tmp_path / "here")
    sizes = {file.name: file.stat().st_size for file in tiny_mixtral.glob("*.safetensors")}
    shards = layer_shards(tiny_mixtral)
    largest = max(sum(sizes[name] for name in own) for own in shards.values())
    assert 0 < max(peaks) <= largest < sum(sizes.values()) / 2
    assert not folder.exists()
    # Not one of them went to the user's cache, and each that a layer needs came once.
    assert not list(Path(constants.HF_HUB_CACHE).rglob("model-*.safetensors"))
    needed = set().union(*shards.values())
    assert {hub.whole(name) for name in needed} == {1}
    assert all(hub.whole(name) <= 1 for name in sizes)


def test_layers_that_lie_in_another_order(hub: HubServer, tiny_mixtral: Path, tmp_path: Path) -> None:
    """By name, as some savers write: layer 10 comes before layer 2; here layer 2 before 0 before 1."""
    tensors = {name: own for file in tiny_mixtral.glob("*.safetensors") for name, own in load_file(file).items()}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((tiny_mixtral / "config.json").read_bytes())
    of_layers = [[name for name in sorted(tensors) if f"layers.{layer}." in name] for layer in (2, 0, 1)]
    rest = [name for name in sorted(tensors) if "layers." not in name]
    order = [name for names in of_layers for name in names] + rest
    # Cut within layers, not between them.
    cuts = [0, 10, 26, 44, len(order)]
    for number, (begin, end) in enumerate(pairwise(cuts), 1):
        file = source / f"model-{number:05}-of-{len(cuts) - 1:05}.safetensors"
        save_file({name: tensors[name] for name in order[begin:end]}, file)
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit(files_of(source))
    compress(source, tmp_path / "here", QUICK)
    streamed(tmp_path / "small")
    assert weights_of(tmp_path / "small") == weights_of(tmp_path / "here")
    needed = set().union(*layer_shards(source).values())
    assert {hub.whole(name) for name in needed} == {1}
    budget = make_planner_config(target_bytes_ratio=0.4, coders="quantize")
    with source_files(NAME, None, tmp_path / "plan.source") as found:
        planned = plan_for_budget(found, QUICK, budget)
    assert planned.resolved() == plan_for_budget(source, QUICK, budget).resolved()
    assert {hub.whole(name) for name in needed} == {2}


def test_layers_that_are_left_as_they_are_come_whole(
    hub: HubServer, mixtral: Repository, tiny_mixtral: Path, tmp_path: Path
) -> None:
    """Their experts are copied, and there are thousands of them: not one request for each."""
    some = make_config(center="mean", workers=1, layers="top:1")
    compress(tiny_mixtral, tmp_path / "here", some)
    with source_files(NAME, None, tmp_path / "own") as source:
        compress(source, tmp_path / "small", some)
    assert weights_of(tmp_path / "small") == weights_of(tmp_path / "here")
    shards = layer_shards(tiny_mixtral)
    others = (shards[0] | shards[1]) - shards[2]
    assert len(others) > 1
    assert {hub.whole(name) for name in others} == {1}
    parts = [own for own in hub.asked if own.path.startswith("/store/") and own.first]
    assert len(parts) < 20


@pytest.mark.parametrize("quantise", [fp8_blocks, int4_groups])
def test_scales_in_another_shard(
    quantise: Callable[..., object], hub: HubServer, tiny_mixtral_bf16: Path, tmp_path: Path
) -> None:
    source, _ = twins(tiny_mixtral_bf16, tmp_path, quantise, "experts")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    parts = [
        {name: own for name, own in tensors.items() if ("scale" in name or "shape" in name) is apart}
        for apart in (False, True)
    ]
    for number, part in enumerate(parts, 1):
        assert part
        save_file(part, source / f"model-{number:05}-of-00002.safetensors")
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit(files_of(source))
    compress(source, tmp_path / "here", QUICK)
    streamed(tmp_path / "small")
    assert weights_of(tmp_path / "small") == weights_of(tmp_path / "here")
    assert [hub.whole(f"model-{number:05}-of-00002.safetensors") for number in (1, 2)] == [1, 1]


def test_a_resumed_stream_fetches_what_is_left(
    hub: HubServer, mixtral: Repository, tiny_mixtral: Path, tmp_path: Path
) -> None:
    shards = layer_shards(tiny_mixtral)
    with pytest.raises(KeyboardInterrupt):
        streamed(tmp_path / "small", Watching(stop_after=2))
    assert (tmp_path / "small.source" / MARKER_NAME).is_file()
    before = {name: hub.whole(name) for own in shards.values() for name in own}
    told = Watching()
    streamed(tmp_path / "small", told, resume=True)
    after = {name: hub.whole(name) for name in before}
    assert set(after.values()) == {1}
    assert sum(after.values()) > sum(before.values())
    assert any("resuming: 3 of 4 shards are written" in text for text in told.said)
    compress(tiny_mixtral, tmp_path / "here", QUICK)
    assert weights_of(tmp_path / "small") == weights_of(tmp_path / "here")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "small"]


def test_killed_while_it_fetches(
    hub: HubServer, mixtral: Repository, tiny_mixtral: Path, tmp_path: Path, resmoe: Resmoe
) -> None:
    last = sorted(set().union(*layer_shards(tiny_mixtral).values()))[-1]
    digest = mixtral.commits[mixtral.revisions["main"]][last].sha256
    command = [sys.executable, "-m", "compress_tools", "compress", NAME, str(tmp_path / "small"), *OPTIONS]
    process = subprocess.Popen(
        command, env=environment(hub, tmp_path / "home"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def kill(path: str) -> None:
        # Asked for whole, not for its header or a copied tensor.
        if path.endswith(digest) and any((tmp_path / "small.source").rglob("*.incomplete")):
            process.send_signal(signal.SIGKILL)
            process.wait()

    hub.on_request = kill
    out, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, out
    assert list((tmp_path / "small.source").rglob("*.incomplete"))
    hub.on_request = lambda path: None
    code, _, err = resmoe("compress", NAME, tmp_path / "small", *OPTIONS, "--resume")
    assert (code, "resuming: 3 of 4 shards are written" in err) == (0, True)
    compress(tiny_mixtral, tmp_path / "here", QUICK)
    assert weights_of(tmp_path / "small") == weights_of(tmp_path / "here")
    assert not (tmp_path / "small.source").exists()


@pytest.mark.parametrize("budget", [(), ("--target-bytes-ratio", "0.5")], ids=["recipe", "budget"])
def test_another_commit_is_not_mixed_in(
    budget: tuple[str, ...], hub: HubServer, mixtral: Repository, tmp_path: Path, resmoe: Resmoe
) -> None:
    first = mixtral.revisions["main"]
    words = ("compress", NAME, tmp_path / "small", "--workers", "1", "--stream")
    with pytest.raises(KeyboardInterrupt):
        streamed(tmp_path / "small", Watching(stop_after=1))
    files = mixtral.commits[first]
    second = mixtral.commit({**files, "notes.md": b"The weights are as they were.\n"})
    asked = len(hub.asked)
    code, _, err = resmoe(*words, *(budget or ("--method", "prune", "--center", "mean")), "--resume")
    assert code == 4
    assert f"was started from another source (commit {first}, now {second})" in err.replace("source: ", "")
    assert f"--revision {first}" in err
    # Neither fetched nor measured before it is said.
    shards = [own for own in hub.asked[asked:] if own.path.startswith("/store/") and own.first is None]
    assert shards == []
    kept = list((tmp_path / "small.source").glob("*.safetensors"))
    assert kept
    if not budget:
        assert resmoe(*words, "--method", "prune", "--center", "mean", "--resume", "--revision", first)[0] == 0
        assert {hub.whole(file.name) for file in kept} == {1}
        report = json.loads((tmp_path / "small" / "resmoe_report.json").read_text())
        assert report["source"] == {"repository": NAME, "revision": first, "commit": first}


def test_started_anew_from_another_commit(hub: HubServer, mixtral: Repository, tmp_path: Path, resmoe: Resmoe) -> None:
    first = mixtral.revisions["main"]
    with pytest.raises(KeyboardInterrupt):
        streamed(tmp_path / "small", Watching(stop_after=1))
    kept = list((tmp_path / "small.source").glob("*.safetensors"))
    assert kept
    second = mixtral.commit({**mixtral.commits[first], "notes.md": b"new"})
    told = Watching()
    streamed(tmp_path / "small", told, overwrite=True)
    assert any(f"at commit {first}, which an earlier run fetched, are removed" in text for text in told.said)
    assert {hub.whole(file.name) for file in kept} == {2}
    report = json.loads((tmp_path / "small" / "resmoe_report.json").read_text())
    assert report["source"]["commit"] == second


def test_a_budget_measures_in_a_stream_too(
    hub: HubServer, mixtral: Repository, tiny_mixtral: Path, tmp_path: Path, resmoe: Resmoe
) -> None:
    words = ("--target-bytes-ratio", "0.4", "--coders", "quantize", "--workers", "1", "--json")
    here, found = (json.loads(resmoe("plan", *source, *words)[1]) for source in ([tiny_mixtral], [NAME, "--stream"]))
    remarks = found.pop("remarks")
    assert remarks[0] == f"{NAME} at commit {mixtral.revisions['main']} (main)"
    here.pop("remarks", None)
    assert found == here
    assert not list(Path(constants.HF_HUB_CACHE).rglob("model-*.safetensors"))
    commit = mixtral.revisions["main"]
    _, out, _ = resmoe("plan", NAME, *words[:-1], "--stream", "--out", tmp_path / "plan.yaml")
    assert f"Next: resmoe compress {NAME} DST --plan {tmp_path / 'plan.yaml'} --revision {commit}\n" in out
    assert resmoe("compress", NAME, tmp_path / "small", *words, "--stream")[0] == 0
    assert resmoe("compress", tiny_mixtral, tmp_path / "here", *words)[0] == 0
    assert weights_of(tmp_path / "small") == weights_of(tmp_path / "here")
    # For measuring once, for compressing once, beside the two plans' own.
    needed = set().union(*layer_shards(tiny_mixtral).values())
    assert {hub.whole(name) for name in needed} == {4}


def test_slices_stream_their_own_layers(
    hub: HubServer, mixtral: Repository, tiny_mixtral: Path, tmp_path: Path, resmoe: Resmoe
) -> None:
    for number in (1, 2, 3):
        words = ("compress", NAME, tmp_path / "small", *OPTIONS, "--shard", f"{number}/3")
        assert resmoe(*words)[0] == 0
    assert resmoe("merge", tmp_path / "small", "--remove-slices")[0] == 0
    compress(tiny_mixtral, tmp_path / "here", QUICK)
    assert weights_of(tmp_path / "small") == weights_of(tmp_path / "here")
    assert json.loads((tmp_path / "small" / "resmoe_report.json").read_text())["source"]["repository"] == NAME
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {"small", "here"}


def test_weights_in_the_users_cache_are_used_and_stay(
    hub: HubServer, mixtral: Repository, tiny_mixtral: Path, tmp_path: Path
) -> None:
    with source_files(NAME, None, None) as source:
        compress(source, tmp_path / "first", QUICK)
    cached = files_of(Path(constants.HF_HUB_CACHE))
    assert any(name.endswith("model-00001-of-00007.safetensors") for name in cached)
    streamed(tmp_path / "second")
    assert {hub.whole(file.name) for file in tiny_mixtral.glob("*.safetensors")} == {1}
    assert files_of(Path(constants.HF_HUB_CACHE)) == cached


def test_what_others_put_there_stays(hub: HubServer, mixtral: Repository, tmp_path: Path) -> None:
    folder = tmp_path / "small.source"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="it holds what resmoe did not; move it away"):
        streamed(tmp_path / "small")
    assert (folder / "mine.txt").read_text() == "mine"
    (folder / "mine.txt").unlink()

    def put(path: str) -> None:
        if (folder / MARKER_NAME).exists():
            (folder / "mine.txt").write_text("mine")

    hub.on_request = put
    told = Watching()
    streamed(tmp_path / "small", told)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    assert any("is kept, as it holds what resmoe did not fetch" in text for text in told.said)


def test_two_runs_do_not_share_a_folder(hub: HubServer, mixtral: Repository, tmp_path: Path) -> None:
    repository = open_repository(NAME, None)
    first = OwnFolder(tmp_path / "own", repository, Silent())
    first.fetch(repository.weights[0])
    with pytest.raises(CheckpointError, match="another process fetches weight files into it"):
        OwnFolder(tmp_path / "own", repository, Silent())
    first.close(finished=False)
    second = OwnFolder(tmp_path / "own", repository, Silent())
    assert second.holds(repository.weights[0]) is not None
    second.close(finished=True)
    assert not os.path.lexists(tmp_path / "own")


def test_a_disk_too_small_is_known_before(
    hub: HubServer, mixtral: Repository, tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make_target(SourceReader(tiny_mixtral), QUICK)
    output = target.expert_bytes_after + target.other_bytes
    for free, fits in ((output + 20_000, False), (output + 1_000_000, True)):
        monkeypatch.setattr("compress_tools.output.writer.free_bytes", lambda path, free=free: free)
        if fits:
            streamed(tmp_path / "small", resume=True)
        else:
            with pytest.raises(CheckpointError, match="make room, then run again with --resume"):
                streamed(tmp_path / "small")
            assert sum(hub.whole(file.name) for file in tiny_mixtral.glob("*.safetensors")) == 0
    monkeypatch.setattr("compress_tools.hub.files._free_bytes", lambda path: 10)
    with pytest.raises(CheckpointError, match=r"needs \d+ bytes for 7 weight files in .*, 10 are free; .*--stream"):
        compress(HubFiles(open_repository(NAME, None)), tmp_path / "other", QUICK)
