"""What csrc/fused_moe_cpu.cpp needs of a processor, and its build."""

import ctypes
import platform
from pathlib import Path

from compress_tools import native_library
from compress_tools.native_library import NativeSource, cpu_flags
from resmoe_vllm.kernels.cpu import self_test, structs


def _check(library: ctypes.CDLL) -> None:
    self_test.check_library(library)


SOURCE = NativeSource(
    Path(__file__).parent / "csrc" / "fused_moe_cpu.cpp",
    check=_check,
    tested_by=tuple(Path(str(module.__file__)) for module in (structs, self_test)),
    flags=("-fopenmp",),
)
NEEDED_CPU_FLAGS = ("avx2", "bmi2", "fma", "f16c")


def missing_cpu_flags() -> list[str]:
    """What this processor lacks for the kernel."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["the x86-64 instruction set"]
    flags = cpu_flags()
    return [flag for flag in NEEDED_CPU_FLAGS if flag not in flags] if flags else ["/proc/cpuinfo"]


def build(*more_flags: str) -> Path:
    """The library, compiled now or before; see ``native_library.build``.

    Raises:
        OSError: no compiler, or the cache cannot be written.
        CalledProcessError: the compiler refuses.
        KernelUnsupportedError: the library fails its self-test; it does not enter the cache.
    """
    return native_library.build(SOURCE, *more_flags)
