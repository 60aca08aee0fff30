"""One compression on a Ray cluster: slices as tasks, then a merge.

    pip install 'resmoe[ray]'
    python -m compress_tools.ray_cluster SRC DST --shards 8 --method trellis

SRC and DST must be the same directories on every node (a shared file system); SRC may be ORG/NAME of the hub, of which
each node fetches what its slices need. Each task is ``resmoe compress SRC DST --shard I/N --resume``: a node that dies
costs at most the layer it worked on, and the same command goes on where it stopped.
"""

import sys
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import click

from compress_tools.cli.commands import force_option, given, main, recipe_configs, revision_option, stream_option
from compress_tools.cli.options import ConfigCommand
from compress_tools.cli.printing import print_report
from compress_tools.cli.sources import opened_source
from compress_tools.config import CompressionConfig, make_config
from compress_tools.damage import RUINED_ERROR
from compress_tools.errors import ConfigError, ResMoEError
from compress_tools.hub.files import is_hub_name
from compress_tools.output.staging import Staging
from compress_tools.output.target import make_target
from compress_tools.pipeline import compress, compress_slice
from compress_tools.progress.listener import Silent
from compress_tools.progress.log import logged
from compress_tools.report import CompressionReport
from compress_tools.slices.merge import merge
from compress_tools.slices.slices import Slice, shards_of, slice_path
from compress_tools.source.source_reader import SourceReader

# A lost worker or node is tried again this often; what it wrote is kept.
MAX_RETRIES = 5


@dataclass(frozen=True)
class Cluster:
    """Where tasks run.

    Attributes:
        address: as ``ray.init`` takes it; None starts Ray on this machine.
        cpus_per_task: CPUs that Ray reserves for a task.
        gpus_per_task: GPUs that Ray reserves for a task.
    """

    address: str | None = None
    cpus_per_task: int = 1
    gpus_per_task: float = 0


@dataclass(frozen=True)
class HubOptions:
    """How a model of the hub is fetched; nothing, for a directory.

    Attributes:
        revision: branch, tag or commit.
        stream: each task keeps no more than the weight files of one layer.
    """

    revision: str | None = None
    stream: bool = False


def make_slice_here(
    src: str,
    dst: str,
    config: CompressionConfig,
    part: Slice,
    hub: HubOptions | None = None,
    most_error: float = inf,
) -> str:
    """What one task does on its node; ``DST.shard-I-of-N.log`` tells how far it is.

    Args:
        src: source directory, or ``ORG/NAME``.
        dst: the whole checkpoint's directory.
        config: the recipe.
        part: which slice.
        hub: how ``ORG/NAME`` is fetched.
        most_error: see ``compress_slice``.
    Returns:
        the slice's directory.
    """
    hub, own = hub or HubOptions(), slice_path(dst, part)
    with (
        logged(Staging(own).log_path, to_stderr=False) as progress,
        opened_source(src, hub.revision, progress, stream=hub.stream, dst=own) as source,
    ):
        return str(compress_slice(source, dst, config, part, resume=True, most_error=most_error, progress=progress))


def compress_on_cluster(  # noqa: PLR0913  what compress takes, and the cluster
    src: str | Path,
    dst: str | Path,
    config: CompressionConfig,
    shards: int,
    cluster: Cluster | None = None,
    *,
    hub: HubOptions | None = None,
    keep_slices: bool = False,
    most_error: float = inf,
) -> CompressionReport:
    """Compress ``src`` into ``dst`` in ``shards`` slices, as tasks of a Ray cluster.

    Args:
        src: source directory, the same on every node; or ``ORG/NAME`` of the hub.
        dst: output directory, the same on every node.
        config: the recipe; ``workers`` assignments run in parallel in each task.
        shards: number of slices; at most the number of layers to be compressed.
        cluster: where they run; default: Ray on this machine, a CPU for each task.
        hub: how ``ORG/NAME`` is fetched.
        keep_slices: leave the slices beside ``dst``.
        most_error: see ``compress_slice`` and ``merge``.
    Returns:
        the report that is also written to ``dst``.
    Raises:
        ConfigError: Ray is not installed, or the request does not fit the model.
        ResMoEError: a slice failed; the others are finished first, so that the next run has them.
    """
    try:
        import ray
    except ImportError as err:
        raise ConfigError("Ray is not installed: pip install 'resmoe[ray]'") from err
    cluster = cluster or Cluster()
    hub, output = hub or HubOptions(), Staging(dst)
    source = str(src) if is_hub_name(src) else str(Path(src).absolute())
    parts = [Slice(number, shards) for number in range(1, shards + 1)]
    # What can be refused is refused before a cluster is asked for anything.
    with opened_source(source, hub.revision, Silent(), stream=hub.stream) as found:
        reader = SourceReader(found)
        shards_of(make_target(reader, config), parts[0])
        # What a branch means must not change between the tasks.
        hub = replace(hub, revision=reader.store.origin.get("commit", hub.revision))
    output.check_free(resume=True, overwrite=False)
    if output.is_finished:
        with (
            logged(output.log_path, to_stderr=True) as progress,
            opened_source(source, hub.revision, progress, stream=hub.stream, dst=output.dst) as found,
        ):
            return compress(found, output.dst, config, resume=True, progress=progress)
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(address=cluster.address)
    try:
        task = ray.remote(make_slice_here).options(
            num_cpus=cluster.cpus_per_task, num_gpus=cluster.gpus_per_task, max_retries=MAX_RETRIES
        )
        running = {task.remote(source, str(output.dst), config, part, hub, most_error): part for part in parts}
        failures: list[ResMoEError] = []
        pending = list(running)
        while pending:
            (done,), pending = ray.wait(pending)
            try:
                print(f"slice {running[done]} is whole: {ray.get(done)}", file=sys.stderr)
            except ray.exceptions.RayError as err:
                failures.append(_as_our_own(running[done], err))
                print(f"slice {running[done]} failed: {failures[-1]}", file=sys.stderr)
        if failures:
            raise failures[0]
    finally:
        if started_here:
            ray.shutdown()
    with logged(output.log_path, to_stderr=False) as progress:
        made = [slice_path(output.dst, part) for part in parts]
        return merge(
            output.dst, made, resume=True, remove_slices=not keep_slices, most_error=most_error, progress=progress
        )


def _as_our_own(part: Slice, err: Exception) -> ResMoEError:
    """A task's own refusal as it was raised there; anything else as one error that says which slice."""
    cause = getattr(err, "cause", None)
    return cause if isinstance(cause, ResMoEError) else ResMoEError(f"slice {part} failed on its node: {err}")


@click.command(
    cls=ConfigCommand,
    configs=recipe_configs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.argument("src")
@click.argument("dst")
@click.option("--shards", type=click.IntRange(min=1), required=True, help="Number of slices, one Ray task each.")
@click.option("--address", help="Ray cluster, such as auto or ray://head:10001.  [default: Ray on this machine]")
@click.option(
    "--cpus-per-task",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="CPUs of a task: --workers unless given. A node's tasks share its memory: see `plan`.",
)
@click.option("--gpus-per-task", type=click.FloatRange(min=0), default=0, show_default=True, help="GPUs of a task.")
@click.option("--keep-slices", is_flag=True, help="Leave the slices beside DST.")
@revision_option
@stream_option
@force_option
def cli(src: str, dst: str, **options: Any) -> None:
    """Compress the MoE checkpoint SRC into DST on a Ray cluster. The same command goes on after a failure."""
    cluster = Cluster(*(options.pop(name) for name in ("address", "cpus_per_task", "gpus_per_task")))
    hub = HubOptions(options.pop("revision"), options.pop("stream"))
    shards, keep_slices = options.pop("shards"), options.pop("keep_slices")
    most_error = inf if options.pop("force") else RUINED_ERROR
    if options["method"] is None:
        raise ConfigError(
            "--method is missing: all slices are made by one coder; a plan for a byte budget needs one run"
        )
    config = make_config(**{"workers": cluster.cpus_per_task, **given(options)})
    report = compress_on_cluster(
        src, dst, config, shards, cluster, hub=hub, keep_slices=keep_slices, most_error=most_error
    )
    print_report(report, dst, as_json=False)


if __name__ == "__main__":
    main(cli)
