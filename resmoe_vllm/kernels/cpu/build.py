"""Compiles csrc/fused_moe_cpu.cpp for the processor it runs on, tests it once, and keeps it in the user's cache."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from resmoe_vllm.kernels.cpu import self_test, structs

SOURCE = Path(__file__).parent / "csrc" / "fused_moe_cpu.cpp"
HEADERS = tuple(sorted(SOURCE.parent.glob("*.h")))
# No contraction: the compiler may not fuse a scalar tail in one loop and not in another, so sums stay the same sums.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
NEEDED_CPU_FLAGS = ("avx2", "bmi2", "fma", "f16c")
# The self-test is part of what was built: another one must run again.
_TESTED_BY = tuple(Path(str(module.__file__)) for module in (structs, self_test))


def missing_cpu_flags() -> list[str]:
    """What this processor lacks for the kernel."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["the x86-64 instruction set"]
    flags = _cpu_flags()
    return [flag for flag in NEEDED_CPU_FLAGS if flag not in flags] if flags else ["/proc/cpuinfo"]


def _cpu_flags() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return next((line.split() for line in lines if line.startswith("flags")), [])


def build(*more_flags: str) -> Path:
    """Compile and test, unless this source, compiler and processor were compiled for before.

    Args:
        more_flags: for the compiler, after its own: ``-mno-avx512f`` leaves the paths of a smaller processor.
    Returns:
        the library, in the user's cache.
    Raises:
        OSError: no compiler, or the cache cannot be written.
        CalledProcessError: the compiler refuses.
        KernelUnsupportedError: the library fails its self-test; it does not enter the cache.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("found neither g++ nor clang++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    sources = [path.read_text() for path in (SOURCE, *HEADERS, *_TESTED_BY)]
    flags = (*FLAGS, *more_flags)
    identity = "\n".join([*sources, version, *_cpu_flags(), *flags])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resmoe"
    target = cache / f"fused_moe_cpu-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Workers may build at the same time: each its own file, the last rename wins.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / target.name
            command = [compiler, *flags, str(SOURCE), "-o", str(built)]
            subprocess.run(command, capture_output=True, text=True, check=True)
            self_test.check_library(ctypes.CDLL(str(built)))
            os.replace(built, target)
    return target
