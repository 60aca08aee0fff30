"""Where an output goes and what it may replace: tried as a user would who has something to lose there."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.config import CompressionConfig, make_config
from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.output.run_identity import versions
from compress_tools.output.run_record import MANIFEST_NAME, RECORD_KEY, read_record
from compress_tools.output.staging import BEGUN_NAME, STATE_DIR, Staging
from compress_tools.pipeline import compress, compress_slice
from compress_tools.progress.listener import Silent
from compress_tools.slices.merge import merge
from compress_tools.slices.slices import Slice, slice_path
from compress_tools.source.reader import INDEX_NAME, CheckpointReader
from compress_tools.stored.inspection import inspect
from compress_tools.stored.restore import restore
from tests.compress_tools.test_pipeline import contents

QUICK = make_config(center="mean", workers=1)
OTHER = make_config(center="mean", workers=1, retain_ratio=0.5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = save_tiny_model(
        "olmoe", tmp_path_factory.mktemp("source") / "model", torch.float32, num_hidden_layers=2, num_experts=2
    )
    (model / "tokenizer.json").write_text('{"any": "thing"}')
    return model


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``small``, its dense form ``dense`` and two slices of it, made once; to be copied."""
    folder = tmp_path_factory.mktemp("made")
    compress(source, folder / "small", QUICK)
    restore(folder / "small", folder / "dense")
    for number in (1, 2):
        compress_slice(source, folder / "small", QUICK, Slice(number, 2))
    return folder


@pytest.fixture
def outputs(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "outputs")


class Listener(Silent):
    """Remembers what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def stamps(path: Path) -> dict[str, tuple[int, int]]:
    return {str(file.relative_to(path)): (file.lstat().st_ino, file.lstat().st_mtime_ns) for file in path.rglob("*")}


# What --overwrite may replace.


def text_file(directory: Path, source: Path) -> str:
    directory.mkdir()
    (directory / "thesis.txt").write_text("years of work")
    return "thesis.txt"


def own_dense_model(directory: Path, source: Path) -> str:
    shutil.copytree(source, directory)
    return "config.json"


def dense_model_by_somebody_else(directory: Path, source: Path) -> str:
    """With an index and shards named as ours are."""
    save_tiny_model("mixtral", directory, torch.float32, max_shard_size="120kB")
    assert (directory / INDEX_NAME).exists()
    return "config.json"


def odd_configs(directory: Path, source: Path) -> str:
    directory.mkdir()
    (directory / "config.json").write_text('{"quantization_config": ["resmoe"]}')
    (directory / INDEX_NAME).write_text('["resmoe_run"]')
    return "config.json"


def only_a_directory(directory: Path, source: Path) -> str:
    (directory / "drafts").mkdir(parents=True)
    return "drafts"


@pytest.mark.parametrize(
    "prepare", [text_file, own_dense_model, dense_model_by_somebody_else, odd_configs, only_a_directory]
)
def test_overwrite_keeps_what_is_not_ours(
    prepare: Callable[[Path, Path], str], source: Path, made: Path, tmp_path: Path
) -> None:
    target = tmp_path / "small"
    name = prepare(target, source)
    before = stamps(target)
    slices = [slice_path(made / "small", Slice(number, 2)) for number in (1, 2)]
    works = (
        partial(compress, source, target, QUICK),
        partial(restore, made / "small", target),
        partial(merge, target, slices),
    )
    for options in ({}, {"overwrite": True}, {"resume": True}):
        for work in works:
            with pytest.raises(CheckpointError, match=f"small: not empty.*{name}"):
                work(**options)
    assert stamps(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def add_notes(directory: Path) -> str:
    (directory / "notes.txt").write_text("mine")
    return "notes.txt"


def add_nested(directory: Path) -> str:
    (directory / ".git" / "objects").mkdir(parents=True)
    (directory / ".git" / "objects" / "ab").write_text("mine")
    return r"\.git/objects/ab"


def add_empty_directory(directory: Path) -> str:
    (directory / "runs").mkdir()
    return "runs"


def add_link(directory: Path) -> str:
    (directory / "elsewhere").symlink_to(directory.parent)
    return "elsewhere"


def add_weights(directory: Path) -> str:
    """As transformers saves a small model over a restored one."""
    (directory / "model.safetensors").write_bytes(b"tuned")
    return "model.safetensors"


ADDED = [add_notes, add_nested, add_empty_directory, add_link, add_weights]


@pytest.mark.parametrize("add", ADDED)
@pytest.mark.parametrize("kind", ["small", "dense", "small.shard-1-of-2"])
def test_overwrite_keeps_what_was_added_to_ours(
    add: Callable[[Path], str], kind: str, outputs: Path, source: Path
) -> None:
    name = add(outputs / kind)
    before = stamps(outputs)
    with pytest.raises(CheckpointError, match=rf"{kind}: not replaced.*own: {name};"):
        if kind == "small":
            compress(source, outputs / kind, OTHER, overwrite=True)
        elif kind == "dense":
            restore(outputs / "small", outputs / kind, overwrite=True)
        else:
            compress_slice(source, outputs / "small", OTHER, Slice(1, 2), overwrite=True)
    assert stamps(outputs) == before


def test_a_tuned_restored_model_is_kept(outputs: Path) -> None:
    """Saved in its place in shards of the same names: its index is another one, so it is no output of ours."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(outputs / "dense")
    model.save_pretrained(outputs / "dense", max_shard_size="50kB")
    before = stamps(outputs)
    with pytest.raises(CheckpointError, match="dense: not"):
        restore(outputs / "small", outputs / "dense", overwrite=True)
    assert stamps(outputs) == before


def tuned_in_place(directory: Path) -> str:
    """Other weights under the same names, shapes and dtypes, the index left as it was."""
    shard = sorted(directory.glob("*.safetensors"))[-1]
    tensors = {name: tensor + 1 for name, tensor in load_file(shard).items()}
    save_file(tensors, shard, metadata={"format": "pt"})
    return shard.name


def test_weights_that_were_tuned_in_their_place_are_kept(outputs: Path, source: Path) -> None:
    name = tuned_in_place(outputs / "dense")
    before = stamps(outputs)
    with pytest.raises(CheckpointError, match=rf"dense: not replaced.*{name} \(changed since\)"):
        restore(outputs / "small", outputs / "dense", overwrite=True)
    with pytest.raises(CheckpointError, match=rf"dense: is finished, but {name} changed since"):
        restore(outputs / "small", outputs / "dense", resume=True)
    assert stamps(outputs) == before


def test_a_damaged_checkpoint_is_replaced(outputs: Path, source: Path) -> None:
    """Cut off, garbled or lost: nobody's work."""
    shards = sorted((outputs / "small").glob("*.safetensors"))
    assert len(shards) == 3
    shards[0].write_bytes(shards[0].read_bytes()[:-10])
    shards[1].write_bytes(b"garbled")
    shards[2].unlink()
    compress(source, outputs / "small", QUICK, overwrite=True)
    assert inspect(outputs / "small").layers


def test_overwrite_replaces_any_output_of_ours(outputs: Path, source: Path) -> None:
    compress(source, outputs / "dense", OTHER, overwrite=True)
    assert contents(outputs / "dense") != contents(outputs / "small")
    restore(outputs / "small", outputs / "dense", overwrite=True)
    assert "quantization_config" not in CheckpointReader(outputs / "dense").config
    compress(source, outputs / "small.shard-1-of-2", QUICK, overwrite=True)
    assert inspect(outputs / "small.shard-1-of-2").layers
    (outputs / "empty").mkdir()
    compress(source, outputs / "empty", QUICK, overwrite=True)
    assert inspect(outputs / "empty").layers


def without_record(directory: Path) -> None:
    index = json.loads((directory / INDEX_NAME).read_text())
    del index[RECORD_KEY]
    (directory / INDEX_NAME).write_text(json.dumps(index))


def test_a_checkpoint_of_an_older_version(outputs: Path, source: Path) -> None:
    """It has no list of its files: what is certainly its own is replaced, the rest must be moved by its owner."""
    small = outputs / "small"
    without_record(small)
    with pytest.raises(CheckpointError, match="does not say what it was made from"):
        compress(source, small, QUICK, resume=True)
    with pytest.raises(CheckpointError, match=r"own: generation_config\.json, tokenizer\.json"):
        compress(source, small, OTHER, overwrite=True)
    (small / "tokenizer.json").unlink()
    (small / "generation_config.json").unlink()
    compress(source, small, OTHER, overwrite=True)
    assert read_record(small) is not None


def test_a_record_lists_every_file_and_only_those(outputs: Path) -> None:
    for name in ("small", "dense", "small.shard-1-of-2", "small.shard-2-of-2"):
        files = {path.relative_to(outputs / name).as_posix() for path in (outputs / name).rglob("*") if path.is_file()}
        record = read_record(outputs / name)
        assert record is not None
        assert list(record.files) == sorted(files), name
        assert {file for file, digest in record.files.items() if digest} == {f for f in files if "safetensors" in f} - {
            INDEX_NAME
        }
        assert (MANIFEST_NAME in files) == ("shard" in name)


# The staging directory.


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_directory_that_happens_to_be_called_partial(options: dict[str, bool], source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "small.partial"
    mine.mkdir()
    (mine / "draft.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"small\.partial.*did not write \(draft\.txt\)"):
        compress(source, tmp_path / "small", QUICK, **options)
    assert (mine / "draft.txt").read_text() == "mine"
    shutil.rmtree(mine)
    (tmp_path / "else").mkdir()
    mine.symlink_to(tmp_path / "else")
    with pytest.raises(CheckpointError, match=r"small\.partial: is not a directory"):
        compress(source, tmp_path / "small", QUICK, **options)
    mine.unlink()
    mine.write_text("a file")
    with pytest.raises(CheckpointError, match=r"small\.partial: is not a directory"):
        compress(source, tmp_path / "small", QUICK, **options)
    assert mine.read_text() == "a file"


class Stop(Silent):
    """Ends a run in one stage, as a failure would."""

    def __init__(self, text: str) -> None:
        self.text = text

    def stage(self, text: str, total: int | None, layer: int | None = None) -> None:
        if text == self.text:
            raise KeyboardInterrupt


def stopped(source: Path, target: Path, text: str = "residuals") -> Path:
    with pytest.raises(KeyboardInterrupt):
        compress(source, target, QUICK, progress=Stop(text))
    return Staging(target).path


def test_what_was_put_into_an_unfinished_run_is_kept(source: Path, tmp_path: Path) -> None:
    unfinished = stopped(source, tmp_path / "small")
    (unfinished / "mine.tmp").write_text("mine")
    (unfinished / "notes.txt").write_text("mine")
    before = stamps(unfinished)
    with pytest.raises(CheckpointError, match=r"small\.partial: not removed.*mine\.tmp, notes\.txt"):
        compress(source, tmp_path / "small", OTHER, overwrite=True)
    assert stamps(unfinished) == before
    compress(source, tmp_path / "small", QUICK, resume=True)
    assert (tmp_path / "small" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "small" / "mine.tmp").read_text() == "mine"
    with pytest.raises(CheckpointError, match=r"own: mine\.tmp, notes\.txt"):
        compress(source, tmp_path / "small", QUICK, overwrite=True)


def test_a_lost_note_is_made_again(source: Path, made: Path, tmp_path: Path) -> None:
    """A crash of the machine takes what the file system had not written: notes, and the end of one."""
    notes = stopped(source, tmp_path / "small") / STATE_DIR / BEGUN_NAME
    assert "model-00001-of-00003.safetensors" in notes.read_text()
    notes.write_text('"generation_config.json"\n"model-000')
    compress(source, tmp_path / "small", QUICK, resume=True)
    assert read_record(tmp_path / "small") == read_record(made / "small")


def test_an_unfinished_run_is_started_again(source: Path, tmp_path: Path) -> None:
    stopped(source, tmp_path / "small")
    compress(source, tmp_path / "small", OTHER, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


# --resume of what is finished.


def work_of(kind: str, source: Path, outputs: Path, **options: object) -> object:
    if kind == "small":
        return compress(source, outputs / "small", QUICK, resume=True, **options)
    if kind == "dense":
        return restore(outputs / "small", outputs / "dense", resume=True, **options)
    if kind == "merge":
        return merge(outputs / "small", resume=True, **options)
    return compress_slice(source, outputs / "small", QUICK, Slice(1, 2), resume=True, **options)


@pytest.mark.parametrize("kind", ["small", "dense", "merge", "slice"])
def test_resuming_what_is_finished_says_so_and_changes_nothing(kind: str, outputs: Path, source: Path) -> None:
    before, listener = stamps(outputs), Listener()
    found = work_of(kind, source, outputs, progress=listener)
    assert stamps(outputs) == before
    (said,) = listener.said
    assert "is finished, from the same source, recipe and versions" in said
    if kind in ("small", "merge"):
        report = json.loads((outputs / "small" / "resmoe_report.json").read_text())
        assert found.content() == report
        assert list(found.seconds) == ["0", "1"]
    if kind == "dense":
        assert found == sum(map(CheckpointReader(source).nbytes, CheckpointReader(source).names))


def edited_source(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    (shard,) = target.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-4] + b"edit")
    return target


def test_resuming_what_is_finished_but_different(outputs: Path, source: Path, tmp_path: Path) -> None:
    before = stamps(outputs)
    for config, message in (
        (OTHER, r"another recipe \(recipe: retain_ratio 0\.25, now 0\.5\)"),
        (make_config(center="none", method="low-rank", seed=3), r"another recipe .*center mean, now none"),
    ):
        with pytest.raises(CheckpointError, match=rf"small: is finished, and was made from {message}"):
            compress(source, outputs / "small", config, resume=True)
    with pytest.raises(CheckpointError, match=r"2: is finished, and was made from another recipe"):
        compress_slice(source, outputs / "small", OTHER, Slice(1, 2), resume=True)
    edited = edited_source(source, tmp_path / "edited")
    with pytest.raises(CheckpointError, match=r"another source \(source: model\.safetensors"):
        compress(edited, outputs / "small", QUICK, resume=True)
    compress(source, tmp_path / "other", OTHER)
    with pytest.raises(CheckpointError, match="dense: is finished, and was made from another source"):
        restore(tmp_path / "other", outputs / "dense", resume=True)
    with pytest.raises(CheckpointError, match="dense: is finished, and was made from another recipe, source"):
        compress(source, outputs / "dense", QUICK, resume=True)
    with pytest.raises(CheckpointError, match="other: is finished, and was made from another recipe"):
        merge(tmp_path / "other", [slice_path(outputs / "small", Slice(number, 2)) for number in (1, 2)], resume=True)
    assert stamps(outputs) == before


def test_resuming_what_another_version_finished(outputs: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress_tools.pipeline.versions", lambda: {**versions(), "torch": "99.0"})
    with pytest.raises(CheckpointError, match=r"another version \(version: torch .*, now 99\.0\)"):
        compress(source, outputs / "small", QUICK, resume=True)


def test_resuming_a_finished_checkpoint_that_lost_something(outputs: Path, source: Path) -> None:
    shard = next((outputs / "small").glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=f"{shard.name}.*truncated"):
        compress(source, outputs / "small", QUICK, resume=True)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}.*missing"):
        compress(source, outputs / "small", QUICK, resume=True)
    shard.write_bytes(whole)
    (outputs / "small" / "resmoe_report.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"resmoe_report\.json: not readable.*--overwrite"):
        compress(source, outputs / "small", QUICK, resume=True)
    part = slice_path(outputs / "small", Slice(1, 2))
    next(part.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="missing, or not of"):
        compress_slice(source, outputs / "small", QUICK, Slice(1, 2), resume=True)
    compress(source, outputs / "small", QUICK, overwrite=True)
    inspect(outputs / "small")


def test_a_finished_merge_whose_slices_are_gone(outputs: Path, source: Path) -> None:
    listener = Listener()
    merge(outputs / "small", overwrite=True, remove_slices=True)
    before = stamps(outputs)
    merge(outputs / "small", resume=True, progress=listener)
    assert "is finished" in listener.said[0]
    assert stamps(outputs) == before
    compress_slice(source, outputs / "small", QUICK, Slice(2, 2))
    merge(outputs / "small", resume=True, remove_slices=True)
    assert sorted(path.name for path in outputs.iterdir()) == ["dense", "small"]
    compress_slice(source, outputs / "small", OTHER, Slice(2, 2))
    with pytest.raises(CheckpointError, match="small: is finished, and was made from another recipe"):
        merge(outputs / "small", resume=True, remove_slices=True)
    assert slice_path(outputs / "small", Slice(2, 2)).is_dir()


def test_merging_removes_no_slice_that_holds_something_else(outputs: Path) -> None:
    (slice_path(outputs / "small", Slice(2, 2)) / "notes.txt").write_text("mine")
    before = stamps(outputs)
    for options in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(CheckpointError, match=r"2-of-2: not replaced or removed.*notes\.txt"):
            merge(outputs / "small", remove_slices=True, **options)
        assert stamps(outputs) == before


# How the destination is spelled.


def resmoe(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compress_tools", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_present_directory(source: Path, made: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    done = resmoe(
        "compress", source, ".", "--method", "prune", "--center", "mean", "--workers", "1", cwd=tmp_path / "small"
    )
    assert done.returncode == 0, done.stderr
    assert "`cd .`" in done.stderr
    assert contents(tmp_path / "small") == contents(made / "small")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "small.log"]
    again = resmoe("compress", source, ".", "--method", "prune", "--center", "mean", "--resume", cwd=tmp_path / "small")
    assert again.returncode == 0, again.stderr
    assert "is finished" in again.stderr
    (tmp_path / "dense").mkdir()
    done = resmoe("restore", tmp_path / "small", "./", cwd=tmp_path / "dense")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "dense") == contents(made / "dense")


def test_no_directory_at_all(source: Path, tmp_path: Path) -> None:
    for words in (("compress", source, ""), ("merge", ""), ("restore", source, "")):
        done = resmoe(*words, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert "the destination is an empty string" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_parent_of_the_present_directory(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "inner")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(CheckpointError, match=r"work: not empty.*inner"):
            compress(source, "..", QUICK, **options)
    compress(source, "../small/", QUICK)
    compress(source, "../../work/./other//", QUICK)
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["inner", "other", "small"]
    assert contents(tmp_path / "work" / "small").keys() == contents(tmp_path / "work" / "other").keys()


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", mount], capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on another disk, without the right to mount one."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other disk here")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_a_link_to_another_disk(source: Path, made: Path, tmp_path: Path, other_disk: Path) -> None:
    (other_disk / "small").mkdir()
    link = tmp_path / "link"
    link.symlink_to(other_disk / "small")
    compress(source, link, QUICK)
    assert link.is_symlink()
    assert not (other_disk / "small").is_symlink()
    assert (other_disk / "small").stat().st_dev != tmp_path.stat().st_dev
    assert contents(other_disk / "small") == contents(made / "small")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link"]
    compress(source, link, OTHER, overwrite=True)
    assert link.is_symlink()
    assert [path.name for path in other_disk.iterdir()] == ["small"]
    for number in (1, 2):
        compress_slice(source, link, QUICK, Slice(number, 2))
    merge(link, overwrite=True, remove_slices=True)
    assert contents(link) == contents(made / "small")
    assert [path.name for path in other_disk.iterdir()] == ["small"]
    # A link on the way there, and a run that is killed and goes on.
    (tmp_path / "folder").symlink_to(other_disk)
    (other_disk / "more").mkdir()
    there = tmp_path / "folder" / "more"
    assert stopped(source, there / "small", "writing") == other_disk / "more" / "small.partial"
    assert (other_disk / "more" / "small.partial").is_dir()
    compress(source, there / "small", QUICK, resume=True)
    restore(there / "small", there / "dense")
    assert contents(other_disk / "more" / "small") == contents(made / "small")
    assert contents(other_disk / "more" / "dense") == contents(made / "dense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link"]


def test_a_link_to_a_mount_point_is_refused_before_the_work(source: Path, tmp_path: Path, mounted: Path) -> None:
    (tmp_path / "link").symlink_to(mounted)
    with pytest.raises(CheckpointError, match="disk: is a mount point"):
        compress(source, tmp_path / "link", QUICK, progress=Stop("reading"))


def test_a_link_that_leads_nowhere_and_one_in_circles(source: Path, made: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("small")
    compress(source, link, QUICK)
    assert link.is_symlink()
    assert contents(tmp_path / "small") == contents(made / "small")
    for name, other in (("one", "two"), ("two", "one")):
        (tmp_path / name).symlink_to(other)
    with pytest.raises(CheckpointError, match="link that leads in circles"):
        compress(source, tmp_path / "one", QUICK)


def test_a_link_to_the_source_is_the_source(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    before = stamps(source)
    with pytest.raises(ConfigError, match="source and destination are the same directory"):
        compress(source, tmp_path / "link", QUICK, overwrite=True)
    with pytest.raises(ConfigError, match="source and destination lie one inside the other"):
        compress(source, tmp_path / "link" / "small", QUICK)
    assert stamps(source) == before


def test_a_source_inside_the_destination_through_links(source: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    shutil.copytree(source, outer / "inner" / "model")
    (tmp_path / "to_outer").symlink_to(outer)
    (tmp_path / "to_model").symlink_to(outer / "inner" / "model")
    before = stamps(outer)
    for src, dst in (("to_model", "outer"), ("outer/inner/model", "to_outer"), ("to_model", "to_outer/inner")):
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match="source and destination lie one inside the other"):
                compress(tmp_path / src, tmp_path / dst, QUICK, overwrite=overwrite)
    assert stamps(outer) == before


def test_a_destination_below_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for name, message in (("file", "exists and is not a directory"), ("file/small", "file is a file; choose")):
        with pytest.raises(CheckpointError, match=message):
            compress(source, tmp_path / name, QUICK)
    done = resmoe("compress", source, "file/small", "--method", "prune", "--center", "mean", cwd=tmp_path)
    assert done.returncode == 4
    assert "is a file; choose a place in a directory" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_merging_into_one_of_the_slices(outputs: Path) -> None:
    before = stamps(outputs)
    slices = [slice_path(outputs / "small", Slice(number, 2)) for number in (1, 2)]
    for options in ({"overwrite": True}, {"overwrite": True, "remove_slices": True}):
        with pytest.raises(ConfigError, match="source and destination are the same directory"):
            merge(slices[0], slices, **options)
    with pytest.raises(ConfigError, match="source and destination are the same directory"):
        merge(slices[1], slices, resume=True, remove_slices=True)
    assert stamps(outputs) == before


# What happens at the destination meanwhile.


class Meanwhile(Silent):
    """Does something in the last stage of all."""

    def __init__(self, change: Callable[[], object]) -> None:
        self.change, self.done = change, False

    def stage(self, text: str, total: int | None, layer: int | None = None) -> None:
        if text == "writing" and layer == 1:
            self.change()
            self.done = True


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("what", ["text file", "checkpoint of ours"])
def test_a_destination_that_appeared_meanwhile(
    what: str, overwrite: bool, source: Path, made: Path, tmp_path: Path
) -> None:
    """Nobody gave permission to replace this one, whatever it is."""
    target = tmp_path / "small"
    change = {
        "text file": lambda: text_file(target, source),
        "checkpoint of ours": lambda: (
            compress(source, target.with_name("other"), OTHER).layers and target.with_name("other").rename(target)
        ),
    }[what]
    others = Meanwhile(change)
    with pytest.raises(CheckpointError, match=r"small: not empty, it appeared or was changed while.*both are kept"):
        compress(source, target, QUICK, overwrite=overwrite, progress=others)
    assert others.done
    theirs, ours = stamps(target), Staging(target).path
    assert (ours / "config.json").exists()
    with pytest.raises(CheckpointError, match="both are kept"):
        compress(source, target, QUICK, resume=True)
    assert stamps(target) == theirs
    target.rename(tmp_path / "kept")
    compress(source, target, QUICK, resume=True)
    assert contents(target) == contents(made / "small")


def test_a_destination_that_was_replaced_or_added_to_meanwhile(outputs: Path, source: Path) -> None:
    target = outputs / "small"
    with pytest.raises(CheckpointError, match=r"small: not replaced.*notes\.txt"):
        compress(source, target, OTHER, overwrite=True, progress=Meanwhile(lambda: add_notes(target)))
    assert (target / "notes.txt").read_text() == "mine"
    (target / "notes.txt").unlink()

    def replace_by_another() -> None:
        target.rename(outputs / "moved")
        compress(source, outputs / "another", make_config(center="none", workers=1))
        (outputs / "another").rename(target)

    staging = Staging(target).path
    shutil.rmtree(staging)
    with pytest.raises(CheckpointError, match="both are kept"):
        compress(source, target, OTHER, overwrite=True, progress=Meanwhile(replace_by_another))
    assert json.loads((target / "resmoe_recipe.json").read_text())["center"] == "none"
    shutil.rmtree(target)
    compress(source, target, OTHER, resume=True)
    assert json.loads((target / "resmoe_recipe.json").read_text())["retain_ratio"] == 0.5
    assert not staging.exists()


def test_the_replaced_checkpoint_of_an_unfinished_run_is_never_removed_in_silence(outputs: Path, source: Path) -> None:
    """Killed between the two renames, and then the destination is there again."""
    target = outputs / "small"
    staging = stopped(source, outputs / "new").rename(outputs / "small.partial")
    target.rename(staging / STATE_DIR / "replaced")
    compress(source, outputs / "other", OTHER)
    (outputs / "other").rename(target)
    with pytest.raises(CheckpointError, match="replaced: the checkpoint that an unfinished run was to replace"):
        compress(source, target, QUICK, overwrite=True)
    assert (staging / STATE_DIR / "replaced" / "config.json").exists()
    assert (target / "config.json").exists()


# Commands that are printed.


def test_the_cards_commands_are_quoted_for_the_shell(source: Path, tmp_path: Path) -> None:
    import shlex

    spaced = tmp_path / "my models; rm -rf ~"
    shutil.copytree(source, spaced / "it's")
    target = tmp_path / "so small & $HOME"
    config: CompressionConfig = make_config(layers="top:1", center="mean", workers=1)
    compress(spaced / "it's", target, config)
    lines = (target / "README.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("resmoe compress")]
    words = shlex.split(line)
    assert words[:4] == ["resmoe", "compress", str(spaced / "it's"), target.name]
    assert words[words.index("--layers") + 1] == "top:1"
    (serve,) = [line for line in lines if line.startswith("vllm serve")]
    assert shlex.split(serve) == ["vllm", "serve", target.name]
    shell = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
    assert shell.stdout.splitlines() == words


def test_names_that_begin_like_an_option(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compress(source, "./-small", QUICK)
    lines = Path("./-small/README.md").read_text().splitlines()
    assert f"vllm serve ./{'-small'}" in lines
    assert os.path.isdir("./-small")


def test_resuming_a_finished_byte_budget_measures_nothing(source: Path, tmp_path: Path) -> None:
    words = ("compress", source, "small", "--target-bytes-ratio", "0.4", "--coders", "quantize", "--workers", "1")
    assert resmoe(*words, cwd=tmp_path).returncode == 0
    before = stamps(tmp_path / "small")
    again = resmoe(*words, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "is finished" in again.stderr
    assert "measuring" not in again.stderr
    for changed in (("--target-bytes-ratio", "0.5"), ("--seed", "3")):
        other = resmoe(*words, *changed, "--resume", cwd=tmp_path)
        assert other.returncode == 4, other.stderr
        assert "was not planned for this budget" in other.stderr
        assert "measuring" not in other.stderr
    assert stamps(tmp_path / "small") == before
    assert not (tmp_path / "small.plan.yaml").exists()
