"""The source of a command: a directory, or a model of the hub that is fetched while the command runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from compress_tools.hub.files import source_files
from compress_tools.output.staging import Staging
from compress_tools.progress.listener import ProgressListener
from compress_tools.source.files import CheckpointFiles


@contextmanager
def opened_source(
    src: str,
    revision: str | None,
    progress: ProgressListener,
    *,
    stream: bool = False,
    dst: str | Path | None = None,
) -> Iterator[str | CheckpointFiles]:
    """What the engine takes for ``SRC``.

    Args:
        src: as the user spelled it.
        revision: ``--revision``.
        progress: told of fetching.
        stream: ``--stream``.
        dst: weight files of a stream go to a folder beside it; by default to one of the system's for temporary files.
    Raises:
        CheckpointError, ConfigError: see ``source_files``.
    """
    if not stream:
        with source_files(src, revision, None, progress) as source:
            yield source
    elif dst is not None:
        with source_files(src, revision, Staging(dst).beside(".source"), progress) as source:
            yield source
    else:
        with (
            TemporaryDirectory(prefix="resmoe-") as folder,
            source_files(src, revision, Path(folder) / "source", progress) as source,
        ):
            yield source
