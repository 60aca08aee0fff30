"""Compiles C++ for the processor it runs on, tests it once, and keeps it in the user's cache."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

# No contraction: the compiler may not fuse a scalar tail in one loop and not in another, so sums stay the same sums.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-shared", "-fPIC")


@dataclass(frozen=True)
class NativeSource:
    """A library's sources.

    Attributes:
        path: of the one file that is compiled; headers beside it belong to it.
        check: what a freshly built library must pass before it enters the cache; raises where it does not.
        tested_by: Python files that ``check`` consists of: another test must run again.
        flags: for the compiler, after ``FLAGS``.
    """

    path: Path
    check: Callable[[ctypes.CDLL], None]
    tested_by: tuple[Path, ...]
    flags: tuple[str, ...] = ()


def cpu_flags() -> list[str]:
    """The instruction sets of this processor, as Linux names them; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return next((line.split()[2:] for line in lines if line.startswith(("flags", "Features"))), [])


def build(source: NativeSource, *more_flags: str, say: Callable[[str], None] | None = None) -> Path:
    """Compile and test, unless these sources, compiler and processor were compiled for before.

    Args:
        source: the library.
        more_flags: for the compiler, after all others: ``-mno-avx512f`` leaves the paths of a smaller processor.
        say: told in a sentence before the compiler is called, which takes up to a minute; not where nothing is built.
    Returns:
        the library, in the user's cache.
    Raises:
        OSError: no compiler, or the cache cannot be written; says which.
        CalledProcessError: the compiler refuses.
        whatever ``source.check`` raises: the library does not enter the cache.
    """
    compiler = _compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    texts = [path.read_text() for path in (source.path, *sorted(source.path.parent.glob("*.h")), *source.tested_by)]
    flags = (*FLAGS, *source.flags, *more_flags)
    identity = "\n".join([*texts, version, platform.machine(), *cpu_flags(), *flags])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resmoe"
    target = cache / f"{source.path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not _intact(target):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(dir=cache)
        except OSError as err:
            raise OSError(f"cannot write to {cache}, where built kernels are kept ({err.strerror}); XDG_CACHE_HOME "
                          f"names another place") from err  # fmt: skip
        # Workers may build at the same time: each its own file, the last rename wins.
        if say is not None:
            say(f"compiling {source.path.name} for this processor with {' '.join(compiler)}; kept in {cache}")
        with folder as name:
            built = Path(name) / target.name
            command = [*compiler, *flags, str(source.path), "-o", str(built)]
            subprocess.run(command, capture_output=True, text=True, check=True)
            with _defaults_of_torch():
                source.check(ctypes.CDLL(str(built)))
            digest = built.with_suffix(".sha256")
            digest.write_text(_digest(built))
            os.replace(built, target)
            os.replace(digest, target.with_suffix(".sha256"))
    return target


@contextmanager
def _defaults_of_torch() -> Iterator[None]:
    """A check makes fp32 tensors on the CPU; vLLM loads a model under that model's dtype and device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def _compiler() -> list[str]:
    """The compiler's command; CXX may hold several words."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named and shutil.which(named[0]) is None:
        raise OSError(f"CXX names {named[0]!r}, which is no command; unset it or install that compiler")
    found = named or [path for path in (shutil.which("g++") or shutil.which("clang++"),) if path]
    if not found:
        raise OSError("found neither g++ nor clang++; install g++ and start again")
    return found


def _intact(target: Path) -> bool:
    """Whether the file is as it was built: a library that was cut off kills the process that calls it."""
    try:
        return target.with_suffix(".sha256").read_text() == _digest(target)
    except OSError:
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
