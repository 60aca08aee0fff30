"""Slices to one checkpoint, the same bytes as a single run's: shards are linked, never computed or rewritten."""

import glob
import re
import shutil
from collections.abc import Iterable
from math import inf
from pathlib import Path
from typing import Any

from compress_tools.errors import CheckpointError
from compress_tools.output.finish import finish, finished_report
from compress_tools.output.outline import Outline
from compress_tools.output.run_identity import MACHINE, differences
from compress_tools.output.staging import Staging, check_only_ours
from compress_tools.output.writer import CheckpointWriter, check_space
from compress_tools.progress.listener import ProgressListener, Silent
from compress_tools.report import CompressionReport
from compress_tools.slices.slices import SliceManifest, read_slice


def merge(
    dst: str | Path,
    slices: Iterable[str | Path] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    remove_slices: bool = False,
    most_error: float = inf,
    progress: ProgressListener | None = None,
) -> CompressionReport:
    """Join the slices that ``compress_slice`` made.

    On one file system the shards are hard links, so no disk is needed; across file systems they are copied.

    Args:
        dst: output directory; appears when it is whole.
        slices: slice directories; none: those that lie beside ``dst``.
        resume: go on with an interrupted merge.
        overwrite: replace ``dst``.
        remove_slices: remove each shard from its slice once it is taken, and the slices at the end.
        most_error: mean relative error above which nothing is published; the merge can be resumed.
        progress: told of shards.
    Returns:
        the report that is also written to ``dst``.
    Raises:
        ConfigError: the error is above ``most_error``.
        CheckpointError: a slice is missing, given twice, unfinished, damaged, or of another source, recipe or version;
            or the disk is full.
    """
    progress = progress or Silent()
    output = Staging(dst)
    # Before slices are looked for: a finished merge may have removed them.
    output.check_free(resume=resume, overwrite=overwrite)
    named = [Path(path).absolute() for path in slices]
    if resume and output.is_finished:
        return _merged_already(output, named, progress, remove_slices=remove_slices)
    manifests = _read_all(output.dst, named or find_slices(output.dst))
    for manifest in manifests:
        output.check_apart(manifest.path)
        if remove_slices:
            check_only_ours(manifest.path)
    first = manifests[0]
    owners = {filename: manifest for manifest in manifests for filename in manifest.records}
    for filename, owner in owners.items():
        # A shard that an interrupted merge took need not be in its slice any more.
        if not (resume and owner.has_shard(filename, output.path)):
            owner.check_shard(filename)
    with CheckpointWriter(output.dst, first.identity, resume=resume, overwrite=overwrite) as writer:
        records = _take_shards(writer, first.outline, owners, progress, remove=remove_slices)
        report = finish(writer, first.outline, first.files(), records, progress, most_error)
    if remove_slices:
        _remove(manifests)
    return report


def _merged_already(
    output: Staging, named: list[Path], progress: ProgressListener, *, remove_slices: bool
) -> CompressionReport:
    """What is left to do once the checkpoint is whole: slices still there are compared, and removed if asked."""
    output.tidy_published()
    manifests: list[SliceManifest] = []
    for path in named or find_slices(output.dst):
        try:
            manifests.append(read_slice(path))
        except CheckpointError as err:
            # Of a slice that was being removed anything may be left.
            progress.say(f"{err}; left as it is, since {output.dst} is finished")
    for manifest in manifests:
        output.check_apart(manifest.path)
        output.check_finished(manifest.identity)
    report = finished_report(output.dst, progress)
    if remove_slices:
        _remove(manifests)
    return report


def _remove(manifests: list[SliceManifest]) -> None:
    """Remove slices; none of them, if one holds something else too."""
    for manifest in manifests:
        check_only_ours(manifest.path)
    for manifest in manifests:
        shutil.rmtree(manifest.path)


def _read_all(dst: Path, paths: list[Path]) -> list[SliceManifest]:
    """Manifests by slice number, once they are known to be all slices of one run."""
    if not paths:
        raise CheckpointError(f"{dst}: no slices {dst.name}.shard-I-of-N beside it; name their directories")
    manifests = [read_slice(path) for path in paths]
    first = manifests[0]
    by_number: dict[int, SliceManifest] = {}
    for manifest in manifests:
        part = manifest.part
        if part.count != first.part.count:
            raise CheckpointError(
                f"{manifest.path}: is slice {part}, {first.path} is slice {first.part}; name slices of one division"
            )
        if different := differences(first.identity, manifest.identity):
            details = "; ".join(f"{name}: {text}" for name, text in different.items())
            raise CheckpointError(
                f"{manifest.path}: was made from another {', '.join(different)} than {first.path} ({details}); "
                "make it again"
            )
        if part.number in by_number:
            raise CheckpointError(
                f"{manifest.path}: slice {part} is given twice, first as {by_number[part.number].path}"
            )
        by_number[part.number] = manifest
    count = first.part.count
    missing = [f"{number}/{count}" for number in range(1, count + 1) if number not in by_number]
    if missing:
        raise CheckpointError(
            f"{dst}: {'slice' if len(missing) == 1 else 'slices'} {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; make them with `resmoe compress --shard`, or name "
            "their directories"
        )
    held = {filename for manifest in manifests for filename in manifest.records}
    if lacking := sorted(first.outline.shards.keys() - held):
        raise CheckpointError(f"{dst}: no slice has {lacking[0]}; make the slices again")
    return [by_number[number] for number in sorted(by_number)]


def _take_shards(
    writer: CheckpointWriter,
    outline: Outline,
    owners: dict[str, SliceManifest],
    progress: ProgressListener,
    *,
    remove: bool,
) -> dict[str, dict[str, Any]]:
    outstanding = [filename for filename in outline.shards if writer.record(filename) is None]
    device = writer.staging.stat().st_dev
    copied = [filename for filename in outstanding if owners[filename].path.stat().st_dev != device]
    check_space(writer, sum(owners[filename].records[filename]["bytes"] for filename in copied), {})
    progress.start(len(outline.shards))
    machines = sorted({str(owner.identity[MACHINE]) for owner in owners.values()})
    if len(machines) > 1:
        progress.say(
            f"slices were made on different machines ({'; '.join(machines)}): the result is as good, but its last "
            "bits may differ from a single run's"
        )
    for filename in outline.shards:
        owner = owners[filename]
        if filename in outstanding:
            progress.stage(f"taking {filename}", None)
            writer.take_shard(owner.path / filename, filename, owner.records[filename])
        if remove:
            (owner.path / filename).unlink(missing_ok=True)
        progress.shard_done()
    return {filename: owners[filename].records[filename] for filename in outline.shards}


def find_slices(dst: Path) -> list[Path]:
    """The slices that lie beside ``dst``, finished or not, by name."""
    pattern = re.compile(re.escape(dst.name) + r"\.shard-\d+-of-\d+(\.partial)?")
    found = dst.parent.glob(glob.escape(dst.name) + ".shard-*-of-*")
    names = {path.name.removesuffix(".partial") for path in found if path.is_dir() and pattern.fullmatch(path.name)}
    return [dst.with_name(name) for name in sorted(names)]
