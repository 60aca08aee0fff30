"""A killed run goes on: the same bytes from every point, in every command, and a clear word where it may not."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tiny_models import save_tiny_model
from compress_tools.config import Slice, make_config
from compress_tools.errors import CheckpointError
from compress_tools.merge import merge
from compress_tools.pipeline import compress, compress_slice
from compress_tools.restore import restore
from compress_tools.slices import MANIFEST_NAME
from compress_tools.staging import staging_path
from compress_tools.verify import verify
from tests.compress_tools.killing import Kill, KillAtChange, KillInShard, KillInStage, killed
from tests.compress_tools.test_pipeline import contents

# The quickest recipe: these tests are about files, and each compresses dozens of times.
QUICK = make_config(center="mean", workers=1)
EVERY_STAGE = [
    KillInStage("copying other tensors"),
    KillInStage("layer 1: reading"),
    KillInStage("layer 1: center"),
    KillInStage("layer 1: residuals"),
    KillInStage("layer 1: writing"),
    KillInShard(1),
    KillInShard(3),
]


def kill_id(kill: object) -> str:
    return f"{type(kill).__name__}-{next(iter(vars(kill).values()))}"


@pytest.mark.parametrize("method", ["prune", "low-rank"])
@pytest.mark.parametrize("kill", EVERY_STAGE, ids=kill_id)
def test_killed_in_every_stage(kill: Kill, method: str, tiny_olmoe: Path, tmp_path: Path) -> None:
    config = make_config(method=method, max_iterations=2, workers=2)
    compress(tiny_olmoe, tmp_path / "whole" / "small", config)
    cut = tmp_path / "cut" / "small"
    assert killed(compress, kill, src=tiny_olmoe, dst=cut, config=config)
    assert not cut.exists()
    with pytest.raises(CheckpointError, match="pass --resume to go on"):
        compress(tiny_olmoe, cut, config)
    compress(tiny_olmoe, cut, config, resume=True)
    assert contents(cut) == contents(tmp_path / "whole" / "small")
    assert [path.name for path in cut.parent.iterdir()] == ["small"]


def prepare_nothing(directory: Path, source: Path) -> None:
    directory.mkdir()


def prepare_old(directory: Path, source: Path) -> None:
    (directory / "small").mkdir(parents=True)
    (directory / "small" / "old.txt").write_text("the old one")


def prepare_slices(directory: Path, source: Path) -> None:
    for number in (1, 2):
        compress_slice(source, directory / "small", QUICK, Slice(number, 2))


def prepare_small(directory: Path, source: Path) -> None:
    compress(source, directory / "small", QUICK)


Prepare = Callable[[Path, Path], None]
Make = Callable[[Path, Path], Callable[..., Any]]
# What lies there before, the work, its options, and every how many changes it is killed: "overwrite" makes all of
# compress's changes and more, so the others need not be tried at each.
JOBS: dict[str, tuple[Prepare, Make, dict[str, bool], int]] = {
    "compress": (prepare_nothing, lambda d, s: partial(compress, s, d / "small", QUICK), {}, 4),
    "overwrite": (prepare_old, lambda d, s: partial(compress, s, d / "small", QUICK), {"overwrite": True}, 1),
    "slice": (prepare_nothing, lambda d, s: partial(compress_slice, s, d / "small", QUICK, Slice(1, 2)), {}, 1),
    "merge": (prepare_slices, lambda d, s: partial(merge, d / "small"), {}, 2),
    "merge and remove": (prepare_slices, lambda d, s: partial(merge, d / "small", remove_slices=True), {}, 1),
    "restore": (prepare_small, lambda d, s: partial(restore, d / "small", d / "dense"), {}, 4),
}


def but_times(found: dict[str, bytes]) -> dict[str, bytes]:
    """A slice's manifest carries the seconds that the merged checkpoint's timings will hold."""
    for name in found:
        if name.endswith(MANIFEST_NAME):
            manifest = json.loads(found[name])
            for record in manifest["records"].values():
                record.pop("seconds", None)
            found[name] = json.dumps(manifest).encode()
    return found


def goes_on(work: Callable[..., Any]) -> bool:
    """Resume; False where there is nothing to resume and the destination is left alone."""
    try:
        work(resume=True)
    except CheckpointError as err:
        if "not empty" not in str(err):
            raise
        return False
    return True


@pytest.mark.parametrize("job", JOBS)
def test_killed_at_every_change_of_the_file_system(job: str, tmp_path: Path) -> None:
    source = save_tiny_model("olmoe", tmp_path / "source", torch.float32, num_hidden_layers=2, num_experts=2)
    prepare, make, options, stride = JOBS[job]
    prepare(tmp_path / "begun", source)
    shutil.copytree(tmp_path / "begun", tmp_path / "whole")
    make(tmp_path / "whole", source)(**options)
    expected = but_times(contents(tmp_path / "whole"))
    not_resumed = []
    for number in range(1, 1000, stride):
        cut = tmp_path / "cut"
        shutil.copytree(tmp_path / "begun", cut)
        work = make(cut, source)
        if not killed(work, KillAtChange(number), **options):
            break
        if job == "overwrite":
            assert [*cut.rglob("old.txt")] or (cut / "small" / "config.json").exists(), number
        if not goes_on(work):
            not_resumed.append(number)
            if (cut / "small" / "old.txt").exists():
                work(**options)
        found = but_times(contents(cut))
        if job == "merge and remove":
            # Killed while slices are removed, all of them being in the checkpoint: what is left of them is rubbish.
            found = {name: content for name, content in found.items() if ".shard-" not in name}
        assert found == expected, number
        assert not staging_path(cut / "small").exists(), number
        shutil.rmtree(cut)
    assert number > 15
    # Before anything was begun, or after all was published.
    assert len(not_resumed) <= (12 if job == "merge and remove" else 6), not_resumed


def interrupted(source: Path, target: Path) -> Path:
    """A staging directory with its first shard written."""

    class Stop(Exception):
        pass

    class StopAfterOne:
        def start(self, total: int) -> None: ...
        def stage(self, text: str, total: int | None) -> None: ...
        def step(self) -> None: ...
        def layer_done(self, report: object, seconds: dict[str, float]) -> None: ...
        def say(self, text: str) -> None: ...
        def shard_done(self) -> None:
            raise Stop

    with pytest.raises(Stop):
        compress(source, target, make_config(), progress=StopAfterOne())
    return staging_path(target)


def test_resume_refuses_another_recipe_and_another_source(tiny_mixtral: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_mixtral, source)
    interrupted(source, tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"another recipe.*retain_ratio 0\.25, now 0\.5"):
        compress(source, tmp_path / "small", make_config(retain_ratio=0.5), resume=True)
    shard = sorted(source.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-4] + b"edit")
    with pytest.raises(CheckpointError, match=f"another source.*{shard.name}"):
        compress(source, tmp_path / "small", make_config(), resume=True)
    compress(source, tmp_path / "small", make_config(), overwrite=True)
    verify(tmp_path / "small", source)
