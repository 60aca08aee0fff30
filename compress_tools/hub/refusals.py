"""What can go wrong with the hub, each in a sentence with its way out."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress_tools.errors import CheckpointError
from compress_tools.text_file import in_words

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_AGAIN = "what is fetched is kept: run the same command again (compress: with --resume)"


@contextmanager
def asking(name: str, revision: str, what: str = "", folder: Path | None = None) -> Iterator[None]:
    """Turn what the hub refuses, or the network, into a sentence.

    Args:
        name: of the repository.
        revision: that is asked for.
        what: file that is asked for; empty for the repository itself.
        folder: where it is to go; None: to the user's cache.
    Raises:
        CheckpointError: see the module.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as err:
        cause = _behind(err)
        if (refused := _refused(name, revision, what, cause)) is not None:
            raise CheckpointError(f"{name}: {refused}") from err
        # What the library refuses is a ValueError, and what goes wrong in xet a RuntimeError.
        if not is_of_network(cause) and not isinstance(cause, ValueError | RuntimeError):
            raise
        raise _of_transfer(name, what, cause, folder) from err


def _behind(err: Exception) -> Exception:
    """The error that kept the library from asking, where it says no more than that the cache lacks a file."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return err.__cause__ if isinstance(err, LocalEntryNotFoundError) and isinstance(err.__cause__, Exception) else err


def _refused(name: str, revision: str, what: str, err: Exception) -> str | None:
    """What the hub says no to; None: it is something else."""
    from huggingface_hub import errors

    hub = endpoint()
    sentences: list[tuple[type[Exception], str]] = [
        (errors.GatedRepoError, f"is gated on {hub}; accept its terms at {hub}/{name}, then {_LOG_IN}"),
        (
            errors.RevisionNotFoundError,
            f"has no revision {revision!r} on {hub}; --revision takes a branch, a tag or a full commit",
        ),
        (
            errors.RepositoryNotFoundError,
            f"no such directory, and no such model on {hub}, or a private one; check the spelling, and for a private "
            f"model {_LOG_IN}",
        ),
        (errors.OfflineModeIsEnabled, offline(name, what).removeprefix(f"{name}: ")),
        (
            errors.EntryNotFoundError,
            f"{what or 'a file'} is missing at revision {revision}; choose another --revision, or tell the model's "
            "makers",
        ),
        (errors.HFValidationError, f"no such directory, and no name of a model of the hub: {in_words(err)}"),
    ]
    return next((text for kind, text in sentences if isinstance(err, kind)), None)


def endpoint() -> str:
    """The hub's address."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def offline(name: str, what: str) -> str:
    """A sentence: the hub must not be asked, and what is wanted is not in the cache."""
    wanted = f"{what} is" if what else "the model is"
    before = "" if what else "no such directory, and "
    return (
        f"{name}: {before}HF_HUB_OFFLINE is set and {wanted} not in the hub's cache; unset it, or fetch the model "
        f"first with `hf download {name}`"
    )


def is_of_network(err: Exception) -> bool:
    """Whether an error came from a request, a transfer, or the disk that it went to."""
    packages = {kind.__module__.partition(".")[0] for kind in type(err).__mro__}
    return bool(packages & {"httpx", "httpx2", "hf_xet", "huggingface_hub", "requests"}) or isinstance(err, OSError)


def is_unreachable(err: BaseException | None) -> bool:
    """Whether the hub did not answer at all."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(err, Exception) and not isinstance(err, HfHubHTTPError) and is_of_network(err)


def _of_transfer(name: str, what: str, err: Exception, folder: Path | None) -> CheckpointError:
    from huggingface_hub.errors import HfHubHTTPError

    where = f"{name}: {what}" if what else name
    if isinstance(err, HfHubHTTPError):
        return CheckpointError(f"{where}: {_of_status(name, err.response.status_code)}")
    if getattr(err, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        other = ", or point HF_HOME to another" if folder is None else ""
        return CheckpointError(f"{where}: {in_words(err)}; make room on that disk{other}: {_AGAIN}")
    if getattr(err, "errno", None) in (errno.EACCES, errno.EROFS, errno.EPERM):
        place = getattr(err, "filename", None) or folder or "the cache"
        advice = "point HF_HOME to a place that you may write" if folder is None else "make it writable"
        return CheckpointError(f"{where}: can't be written to {place}: {in_words(err)}; {advice}")
    if "Consistency check failed" in str(err):
        return CheckpointError(f"{where}: arrived with another size than the hub says; {_AGAIN}")
    tried = "" if what else "no such directory, and "
    kind = in_words(err) or type(err).__name__
    return CheckpointError(f"{where}: {tried}{endpoint()} can't be reached or broke off ({kind}); {_AGAIN}")


def _of_status(name: str, status: int) -> str:
    if status in (401, 403):
        return f"{endpoint()} refuses access (HTTP {status}); see {endpoint()}/{name} for its terms, then {_LOG_IN}"
    if status == 429:
        return f"{endpoint()} has had too many requests (HTTP 429); wait some minutes, or {_LOG_IN}: {_AGAIN}"
    if status >= 500:
        return f"{endpoint()} is out of order (HTTP {status}); {_AGAIN}"
    return f"{endpoint()} refuses it (HTTP {status}); check name, revision and HF_ENDPOINT"
