"""`make sanitize`: the C++ kernels under gcc's sanitizers, on every path of this processor; docs/notes/fuzzing.md."""

import argparse
import os
import platform
import subprocess
import sys
from dataclasses import dataclass

from resmoe_vllm.kernels.cpu import build


@dataclass(frozen=True)
class Sanitizer:
    """How a sanitizer is built in and run.

    Attributes:
        flags: for the compiler.
        runtime: library that must be in the process before all others.
        variables: its options.
        options: of ``tests.sanitize.run``.
    """

    flags: tuple[str, ...]
    runtime: str
    variables: dict[str, str]
    options: tuple[str, ...] = ()


_COMMON = ("-O1", "-g", "-fno-omit-frame-pointer")
SANITIZERS = {
    # Python keeps what it allocated at its end: leaks are not looked for.
    "address": Sanitizer((*_COMMON, "-fsanitize=address"), "libasan.so", {"ASAN_OPTIONS": "detect_leaks=0"}),
    "undefined": Sanitizer(
        (*_COMMON, "-fsanitize=undefined", "-fno-sanitize-recover=undefined"),
        "libubsan.so",
        {"UBSAN_OPTIONS": "print_stacktrace=1"},
    ),
    # torch is not instrumented, so what it does among its own threads is not looked at.
    "thread": Sanitizer(
        (*_COMMON, "-fsanitize=thread"),
        "libtsan.so",
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1 exitcode=66"},
        ("--shim",),
    ),
}


def main() -> int:
    """Each sanitizer on each path; 1 where one found anything."""
    parser = argparse.ArgumentParser(prog="make sanitize", description=__doc__)
    parser.add_argument("--only", choices=sorted(SANITIZERS), action="append")
    parser.add_argument("--path", choices=build.available_paths(), action="append")
    parser.add_argument("--mutants", type=int, default=100, help="changed checkpoints of the fuzzer on each path")
    options = parser.parse_args()
    failed = 0
    for name in options.only or SANITIZERS:
        for path in options.path or build.available_paths():
            done = run(SANITIZERS[name], path, options.mutants)
            failed += done.returncode != 0
            lines = done.stdout.strip().splitlines()
            print(f"{name}, {path}: {lines[-1] if lines and not done.returncode else 'FOUND'}", flush=True)
            if done.returncode:
                print(done.stdout[-2000:], done.stderr[-8000:], sep="\n", file=sys.stderr)
    return int(failed > 0)


def run(sanitizer: Sanitizer, path: str, mutants: int) -> subprocess.CompletedProcess[str]:
    """Build and run in a process of its own."""
    asked = ["g++", f"-print-file-name={sanitizer.runtime}"]
    runtime = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    variables = {
        **os.environ,
        **sanitizer.variables,
        "LD_PRELOAD": os.path.realpath(runtime),
        "CXX": "g++",
        build.PATH_VARIABLE: path,
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    # The sanitizers' memory must lie where they expect it.
    fixed = ["setarch", platform.machine(), "--addr-no-randomize"]
    flags = [*sanitizer.options, "--mutants", str(mutants), "--", *sanitizer.flags]
    command = [*fixed, sys.executable, "-m", "tests.sanitize.run", *flags]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
