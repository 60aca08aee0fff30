"""What csrc/fused_moe_cpu.cpp needs of a processor, and its build."""

import ctypes
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from compress_tools import native_library
from compress_tools.errors import KernelUnsupportedError
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
PATH_VARIABLE = "RESMOE_CPU_PATH"
# what every path of an instruction set needs, as /proc/cpuinfo names it
NEEDED_CPU_FLAGS = {"x86-64": ("avx2", "bmi2", "fma", "f16c"), "ARM64": ("asimd",)}
INSTRUCTION_SETS = {"x86_64": "x86-64", "AMD64": "x86-64", "aarch64": "ARM64", "arm64": "ARM64"}


@dataclass(frozen=True)
class CpuPath:
    """Instructions that the kernel can be built of; csrc/path.h chooses by what the compiler is told.

    One library for each: everything in it is compiled for the path, and ``-march=native`` knows the processor better
    than a list of targets would. Of ARM64 a path names its own: nothing can be taken back from ``native`` there.

    Attributes:
        instruction_set: whose path it is.
        cpu_flags: what a processor needs for it beside ``NEEDED_CPU_FLAGS``.
        flags: for the compiler, so that it takes nothing better.
    """

    instruction_set: str
    cpu_flags: tuple[str, ...]
    flags: tuple[str, ...]


# the best first
PATHS = {
    "avx512": CpuPath("x86-64", ("avx512bw", "avx512vl", "avx512_vnni", "avx512vbmi"), ()),
    "avxvnni": CpuPath("x86-64", ("avx_vnni",), ("-mno-avx512f",)),
    "avx2": CpuPath("x86-64", (), ("-mno-avx512f", "-mno-avxvnni")),
    "i8mm": CpuPath("ARM64", ("asimddp", "i8mm"), ("-march=armv8.2-a+dotprod+i8mm",)),
    "dotprod": CpuPath("ARM64", ("asimddp",), ("-march=armv8.2-a+dotprod",)),
    "neon": CpuPath("ARM64", (), ("-march=armv8-a",)),
}


def instruction_set() -> str | None:
    """This processor's, if the kernel has a path of it."""
    return INSTRUCTION_SETS.get(platform.machine())


def missing_cpu_flags() -> list[str]:
    """What this processor lacks for the kernel."""
    own = instruction_set()
    if own is None:
        return ["the instruction set x86-64 or ARM64"]
    flags = cpu_flags()
    return [flag for flag in NEEDED_CPU_FLAGS[own] if flag not in flags] if flags else ["/proc/cpuinfo"]


def available_paths() -> list[str]:
    """The paths that this processor can run, the best first."""
    own, flags = instruction_set(), set(cpu_flags())
    return [name for name, path in PATHS.items() if path.instruction_set == own and flags.issuperset(path.cpu_flags)]


def chosen_path() -> str:
    """The processor's best path, or the one that ``RESMOE_CPU_PATH`` names.

    Raises:
        KernelUnsupportedError: it names one that does not exist or that this processor can't run; or there is none.
    """
    if missing := missing_cpu_flags():
        raise KernelUnsupportedError(f"the C++ kernel has no path here: the processor lacks {', '.join(missing)}")
    available = available_paths()
    named = os.environ.get(PATH_VARIABLE) or available[0]
    if named not in available:
        raise KernelUnsupportedError(
            f"{PATH_VARIABLE} is {named!r}; this processor runs {', '.join(available)}: name one of them, or none"
        )
    return named


def build(*more_flags: str, say: Callable[[str], None] | None = None) -> Path:
    """The library of the chosen path, compiled now or before; see ``native_library.build``.

    Args:
        more_flags: for the compiler.
        say: told before the compiler is called.
    Raises:
        OSError: no compiler, or the cache cannot be written.
        CalledProcessError: the compiler refuses.
        KernelUnsupportedError: the library fails its self-test, and does not enter the cache; or there is no such path.
    """
    return native_library.build(SOURCE, *PATHS[chosen_path()].flags, *more_flags, say=say)
