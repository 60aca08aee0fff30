"""A killed run goes on: the same bytes from every point, in every command, and a clear word where it may not."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.config import CompressionConfig, make_config
from compress_tools.errors import CheckpointError, NumericalError
from compress_tools.output.run_record import MANIFEST_NAME
from compress_tools.output.staging import IDENTITY_NAME, REPLACED_NAME, STATE_DIR, Staging, hold
from compress_tools.pipeline import compress, compress_slice
from compress_tools.progress.listener import Silent
from compress_tools.report import LayerReport
from compress_tools.slices.merge import merge
from compress_tools.slices.slices import Slice
from compress_tools.stored.restore import restore
from compress_tools.stored.verify import verify
from tests.compress_tools.output.killing import Kill, KillAtChange, KillInShard, KillInStage, killed
from tests.compress_tools.test_pipeline import contents

# The quickest recipe: these tests are about files, and each compresses dozens of times.
QUICK = make_config(center="mean", workers=1)
OLD = make_config(center="mean", workers=1, retain_ratio=0.5)
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


def test_two_processes_do_not_write_one_directory(tiny_olmoe: Path, tmp_path: Path) -> None:
    dst = tmp_path / "small"
    assert killed(compress, KillInShard(1), src=tiny_olmoe, dst=dst, config=QUICK)
    other = hold(Staging(dst).path)
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(CheckpointError, match="another process is writing it"):
            compress(tiny_olmoe, dst, QUICK, **options)
    os.close(other)
    compress(tiny_olmoe, dst, QUICK, resume=True)
    assert dst.exists()


def prepare_nothing(directory: Path, source: Path) -> None:
    directory.mkdir()


def prepare_old(directory: Path, source: Path) -> None:
    compress(source, directory / "small", OLD)


def kept_share(directory: Path) -> float | None:
    recipe = directory / "resmoe_recipe.json"
    whole = recipe.exists() and (directory / "config.json").exists()
    return json.loads(recipe.read_text())["retain_ratio"] if whole else None


def is_old(directory: Path = Path("/nowhere")) -> bool:
    return kept_share(directory) == OLD.retain_ratio


def is_new(directory: Path) -> bool:
    return kept_share(directory) == QUICK.retain_ratio


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
    "merge and remove": (prepare_slices, lambda d, s: partial(merge, d / "small", remove_slices=True), {}, 2),
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
        if "not empty" not in str(err) and "is finished, and was made from another recipe" not in str(err):
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
            assert is_old(cut / "small") or is_old(*cut.rglob(REPLACED_NAME)) or is_new(cut / "small"), number
        if not goes_on(work):
            not_resumed.append(number)
            if is_old(cut / "small"):
                work(**options)
        found = but_times(contents(cut))
        if job == "merge and remove":
            # Killed while slices are removed, all of them being in the checkpoint: what is left of them is rubbish.
            found = {name: content for name, content in found.items() if ".shard-" not in name}
        assert found == expected, number
        assert not Staging(cut / "small").path.exists(), number
        shutil.rmtree(cut)
    assert number > 15
    # Before anything was begun, or after all was published.
    assert len(not_resumed) <= (12 if job == "merge and remove" else 6), not_resumed


def killed_after_one_layer(source: Path, target: Path, config: CompressionConfig) -> bool:
    """Stop, in this process, once layer 0 is written."""

    class Stop(Exception):
        pass

    class StopAfterLayer(Silent):
        def layer_done(self, report: LayerReport, seconds: dict[str, float]) -> None:
            raise Stop

    with pytest.raises(Stop):
        compress(source, target, config, progress=StopAfterLayer())
    return Staging(target).path.is_dir() and not target.exists()


def test_resume_refuses_another_recipe_and_another_source(tiny_mixtral: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_mixtral, source)
    assert killed_after_one_layer(source, tmp_path / "small", make_config())
    with pytest.raises(CheckpointError, match=r"another recipe.*retain_ratio 0\.25, now 0\.5"):
        compress(source, tmp_path / "small", make_config(retain_ratio=0.5), resume=True)
    shard = sorted(source.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-4] + b"edit")
    with pytest.raises(CheckpointError, match=f"another source.*{shard.name}"):
        compress(source, tmp_path / "small", make_config(), resume=True)
    compress(source, tmp_path / "small", make_config(), overwrite=True)
    verify(tmp_path / "small", source)


@pytest.mark.parametrize("method", ["prune", "low-rank"])
def test_threads_and_workers_do_not_change_the_bytes(method: str, tiny_mixtral: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    made = []
    try:
        for threads, workers in ((1, 1), (2, 1), (1, 2), (2, 3)):
            torch.set_num_threads(threads)
            directory = tmp_path / f"{threads}-{workers}" / "small"
            compress(tiny_mixtral, directory, make_config(method=method, workers=workers))
            assert torch.get_num_threads() == threads
            made.append(contents(directory))
    finally:
        torch.set_num_threads(before)
    assert made[1:] == made[:-1]


def test_another_kind_of_machine_is_said(tiny_mixtral: Path, tmp_path: Path) -> None:
    assert killed_after_one_layer(tiny_mixtral, tmp_path / "small", QUICK)
    file = Staging(tmp_path / "small").path / STATE_DIR / IDENTITY_NAME
    identity = json.loads(file.read_text())
    identity["machine"]["cpu"] = "a PDP-11"
    file.write_text(json.dumps(identity))
    said: list[str] = []

    class Listener(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    compress(tiny_mixtral, tmp_path / "small", QUICK, resume=True, progress=Listener())
    assert said[0] == "resuming: 2 of 4 shards are written"
    assert "a PDP-11" in said[1]


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("version", "torch", "1.0", r"another version \(version: torch 1\.0, now "),
        ("version", "lapx", None, r"another version \(version: lapx absent, now "),
        ("version", "numpy", "1.0", r"another version \(version: numpy 1\.0, now "),
        ("recipe", "seed", 7, r"another recipe \(recipe: seed 7, now 0\)"),
        ("source", "config.json", "0123", r"another source \(source: config\.json 0123, now "),
    ],
)
def test_a_refusal_names_what_differs(
    part: str, key: str, value: object, message: str, tiny_mixtral: Path, tmp_path: Path
) -> None:
    assert killed_after_one_layer(tiny_mixtral, tmp_path / "small", QUICK)
    file = Staging(tmp_path / "small").path / STATE_DIR / IDENTITY_NAME
    identity = json.loads(file.read_text())
    identity[part][key] = value
    file.write_text(json.dumps(identity))
    with pytest.raises(CheckpointError, match=message):
        compress(tiny_mixtral, tmp_path / "small", QUICK, resume=True)


def test_a_torn_shard_is_written_again(tiny_mixtral: Path, tmp_path: Path) -> None:
    """A crash of the machine can lose what the file system had promised."""
    assert killed_after_one_layer(tiny_mixtral, tmp_path / "small", QUICK)
    os.truncate(Staging(tmp_path / "small").path / "model-00002-of-00004.safetensors", 1000)
    compress(tiny_mixtral, tmp_path / "small", QUICK, resume=True)
    verify(tmp_path / "small", tiny_mixtral)


def test_an_unfinished_directory_renamed_by_hand_is_not_taken_for_whole(tiny_mixtral: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    assert killed_after_one_layer(tiny_mixtral, small, QUICK)
    Staging(small).path.rename(small)
    before = contents(small)
    with pytest.raises(CheckpointError, match="not empty"):
        compress(tiny_mixtral, small, QUICK, resume=True)
    assert contents(small) == before
    small.rename(Staging(small).path)
    compress(tiny_mixtral, small, QUICK, resume=True)
    verify(small, tiny_mixtral)


def test_an_interrupted_replacement_is_put_back_or_finished(tiny_mixtral: Path, tmp_path: Path) -> None:
    """Killed between the two renames: the old checkpoint is in the state directory, and nothing at its place."""
    small = tmp_path / "small"
    staging = killed_while_replacing(tiny_mixtral, small)
    with pytest.raises(CheckpointError, match=r"replaces is safe in .*replaced\); pass --resume"):
        compress(tiny_mixtral, small, QUICK)
    with pytest.raises(NumericalError):
        compress(tiny_mixtral, small, QUICK, overwrite=True, progress=Failing())
    assert is_old(small)
    shutil.rmtree(small)
    shutil.rmtree(staging)
    killed_while_replacing(tiny_mixtral, small)
    compress(tiny_mixtral, small, QUICK, resume=True)
    verify(small, tiny_mixtral)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


class Failing(Silent):
    """A run that fails at once."""

    def start(self, total: int, unit: str = "shard") -> None:
        raise NumericalError("stop")


def killed_while_replacing(source: Path, target: Path) -> Path:
    compress(source, target, OLD)
    rename, calls = os.replace, []

    def rename_once(old: Path, new: Path) -> None:
        if Path(old) == Staging(target).path:
            calls.append(new)
            raise KeyboardInterrupt
        rename(old, new)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", rename_once)
        compress(source, target, QUICK, overwrite=True)
    assert calls == [target]
    assert not target.exists()
    return Staging(target).path
