"""`python -m benchmarks.gpu_day`: what a GPU has to show, in 25 minutes, in an order that wastes none of them.

Needs a card and no network. Each step is a process with a limit of its own, and writes its rows one by one, so that a
step that is killed leaves what it has. The first wrong result ends the day. What is done is not done again: the command
goes on where it stopped, until the kernels change. All rows are in rows.json in the end.

`--rehearse` goes the same way on a CPU, in Triton's interpreter, with tiny shapes; what it measures means nothing.

Exit codes: 0 all done, 1 a result is wrong, 2 there is no GPU, 3 time ran out or a step failed.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_day.plan import MINUTES, STEPS, Step
from benchmarks.harness.arguments import made_folder, minutes
from benchmarks.harness.environment import REPO, collect_environment

# exit codes of a step
WRONG, ABSENT = 9, 4
# a step that could get less is left for the next visit
LEAST_SECONDS = 20


def sources_hash() -> str:
    """Of the code that is tried; other code has everything before it."""
    files = sorted(path for name in ("resmoe_vllm", "benchmarks/gpu_day") for path in (REPO / name).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def run(step: Step, folder: Path, seconds: float, *, rehearse: bool) -> dict[str, Any]:
    """Run one step; what became of it."""
    command = step.command(str(folder), rehearse=rehearse)
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    if rehearse:
        environment["TRITON_INTERPRET"] = "1"
    with (folder / f"{step.name}.log").open("a") as log:
        process = subprocess.Popen(
            command, cwd=REPO, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
            became = {0: "done", WRONG: "wrong", ABSENT: "not possible here"}.get(code, f"failed, exit code {code}")
        except subprocess.TimeoutExpired:
            became = f"out of time after {seconds:.0f} s"
        finally:
            # the step's own children, servers above all, are of its session
            _end(process)
    return {"step": step.name, "became": became, "seconds": round(time.monotonic() - began, 1)}


def _end(process: subprocess.Popen[bytes]) -> None:
    for how, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue


def read_state(folder: Path) -> dict[str, Any]:
    """What earlier visits did with the same code; empty where there was none."""
    file = folder / "state.json"
    state = json.loads(file.read_text()) if file.exists() else {}
    return state if state.get("sources") == sources_hash() else {"sources": sources_hash(), "steps": {}}


def collect_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of all steps; a last line that was cut off is left out."""
    lines = [
        line for step in STEPS for file in folder.glob(f"{step.name}.jsonl") for line in file.read_text().splitlines()
    ]
    return [json.loads(line) for line in lines if line.endswith("}")]


def main(argv: list[str] | None = None) -> int:
    """Run what is left of the day; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_day",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny: does the script itself work?")
    parser.add_argument("--folder", type=Path, help="rows, logs and state; default: build/gpu-day, build/gpu-rehearsal")
    parser.add_argument("--minutes", type=minutes, default=MINUTES, help="of this visit")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], metavar="STEP")
    parser.add_argument("--again", action="store_true", help="forget what earlier visits did")
    options = parser.parse_args(argv)
    usual = REPO / "build" / ("gpu-rehearsal" if options.rehearse else "gpu-day")
    folder = made_folder(parser, options.folder or usual)
    if not options.rehearse and collect_environment().gpu is None:
        print("benchmarks.gpu_day: no GPU here; --rehearse tries the script itself", file=sys.stderr)
        return 2
    state = read_state(folder)
    if options.again or not state["steps"]:
        for step in STEPS:
            for ending in ("jsonl", "log"):
                (folder / f"{step.name}.{ending}").unlink(missing_ok=True)
        state["steps"] = {}
    code = visit(folder, state, options)
    rows = collect_rows(folder)
    (folder / "rows.json").write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    print(f"{len(rows)} rows in {folder / 'rows.json'}")
    return code


def visit(folder: Path, state: dict[str, Any], options: argparse.Namespace) -> int:
    """Steps that are not done yet, until one is wrong or time is out; the exit code."""
    deadline = time.monotonic() + 60 * options.minutes
    code = 0
    for step in STEPS:
        if options.only and step.name not in options.only:
            continue
        before = state["steps"].get(step.name, {})
        if before.get("became") in ("done", "not possible here"):
            print(f"{step.name}: {before['became']} before")
            continue
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            print(f"{step.name}: left for the next visit, {left:.0f} s are left of this one")
            code = 3
            continue
        print(f"{step.name}: {step.why}", flush=True)
        # written before it runs, too: whoever kills this process finds where it was
        state["steps"][step.name] = {"step": step.name, "became": "killed"}
        write_state(folder, state)
        state["steps"][step.name] = found = run(step, folder, min(step.seconds, left), rehearse=options.rehearse)
        write_state(folder, state)
        print(f"{step.name}: {found['became']}, {found['seconds']} s", flush=True)
        if found["became"] in ("done", "not possible here"):
            continue
        print("\n".join((folder / f"{step.name}.log").read_text().splitlines()[-15:]))
        if found["became"] == "wrong":
            print(f"{step.name}: a result is wrong, nothing else is tried")
            return 1
        code = 3
        if step.vital:
            print(f"{step.name}: nothing that comes after it is worth anything without it")
            return 3
    return code


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """At once or not at all."""
    part = folder / "state.json.part"
    part.write_text(json.dumps(state, indent=2) + "\n")
    part.replace(folder / "state.json")


if __name__ == "__main__":
    sys.exit(main())
