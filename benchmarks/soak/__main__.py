"""`make soak`, `python -m benchmarks.soak [--requests N] [--original DIR]`: exit code 1 where a promise is broken."""

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.models.prepared import compress, ensure_reference_model
from benchmarks.models.reference_models import preset_config
from benchmarks.serving.server import VllmServer
from benchmarks.soak.load import ANSWERED, CANCELLED, CLIENTS, PARTS, WARM_UP, Loaded, run
from benchmarks.soak.plan import Plan
from compress_tools.errors import ResMoEError
from compress_tools.source.reader import CheckpointReader
from compress_tools.stored.restore import restore

TWIN, COMPRESSED = "dense twin", "compressed"
MIB = 2**20
# How much more memory a server's processes may hold at a load's end than behind its warm-up.
MAX_GROWTH = 24 * MIB
# oneDNN keeps what it compiled for each shape, in either server: 55 to 73 MiB behind the warm-up, in which a leak
# would not be seen.
ENV = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
# A cache for more requests than eight clients send, and small enough that the warm-up touches every page of it.
OPTIONS = ("--block-size", "32", "--num-gpu-blocks-override", "256")
CONTEXT = 256


def main(argv: list[str] | None = None) -> int:
    """Make the models, load one server after the other, compare, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=800, help="to each server, a multiple of 8 (default 800)")
    parser.add_argument("--original", type=Path, help="MoE checkpoint; trained here in seconds if absent")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (default 0)")
    args = parser.parse_args(argv)
    if args.requests < CLIENTS * PARTS or args.requests % CLIENTS:
        parser.error(f"--requests {args.requests}: must be a multiple of {CLIENTS} and at least {CLIENTS * PARTS}")
    begun, console = time.perf_counter(), Console(stderr=True)
    found: dict[str, Loaded] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="resmoe-soak-") as name:
            models = _models(args.original, Path(name), console)
            config = CheckpointReader(models[TWIN]).config
            plan = Plan(args.seed, config["vocab_size"], config["max_position_embeddings"])
            for role, model_dir in models.items():
                log = Path(name) / f"{role}.log"
                with VllmServer(model_dir, OPTIONS, ENV, log_path=log, console=console) as server:
                    console.print(f"{role}: {args.requests} requests of {CLIENTS} clients", highlight=False)
                    found[role] = run(server, plan, args.requests // CLIENTS)
    except ResMoEError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    _print(found)
    broken = complaints(found[TWIN], found[COMPRESSED])
    for text in broken:
        print(f"broken: {text}")
    print(f"{'FAILED' if broken else 'passed'} after {(time.perf_counter() - begun) / 60:.1f} minutes")
    return 1 if broken else 0


def complaints(twin: Loaded, compressed: Loaded) -> list[str]:
    """What a compressed checkpoint's server does that it must not, each a sentence."""
    broken: list[str] = []
    for client, (theirs, ours) in enumerate(zip(twin.outcomes, compressed.outcomes, strict=True)):
        for number, (expected, outcome) in enumerate(zip(theirs, ours, strict=True)):
            # Whether a client's patience or the answer ended first is chance.
            chance = {expected, outcome} <= {ANSWERED, CANCELLED}
            if outcome != expected and not chance:
                broken.append(f"request {number} of client {client}: {outcome}; the dense twin: {expected}")
    broken += [f"an answer changed: {text}" for text in compressed.changed]
    if compressed.growth() > MAX_GROWTH:
        broken.append(
            f"memory grew by {compressed.growth() / MIB:.1f} MiB behind the warm-up, at most {MAX_GROWTH / MIB:.0f} "
            f"may; the dense twin's: {twin.growth() / MIB:.1f} MiB"
        )
    if compressed.left:
        broken.append(f"{compressed.left} requests were still there 30 s after the last client had gone")
    return broken


def _models(original: Path | None, folder: Path, console: Console) -> dict[str, Path]:
    """The compressed checkpoint and its restored twin, the twin first."""
    if original is None:
        original = folder / "original"
        ensure_reference_model(preset_config("tiny", context_length=CONTEXT), original, console)
    compress(original, folder / "compressed", "--target-bytes-ratio", "0.25", console=console)
    restore(folder / "compressed", folder / "twin")
    return {TWIN: folder / "twin", COMPRESSED: folder / "compressed"}


def _shown_bytes(one: Loaded, part: int) -> str:
    return f"{one.median_bytes(part) / MIB:,.1f} MiB"


def _print(found: dict[str, Loaded]) -> None:
    table = Table(title=f"{CLIENTS} clients, one load on both")
    table.add_column("")
    for role in found:
        table.add_column(role, justify="right")
    rows = {
        "requests sent": lambda one: f"{one.sent:,}",
        "answered": lambda one: f"{one.count(ANSWERED):,}",
        "refused as wrong (4xx)": lambda one: f"{one.count('refused'):,}",
        "failed": lambda one: f"{one.failed:,}",
        "cancelled by the client": lambda one: f"{one.count(CANCELLED):,}",
        "still running afterwards": lambda one: f"{one.left:,}",
        "fixed prompts answered under load": lambda one: f"{one.fixed:,}",
        "of all fixed answers, changed": lambda one: f"{len(one.changed):,}",
        "memory when healthy": lambda one: f"{one.healthy_bytes / MIB:,.1f} MiB",
        **{
            f"memory, {10 * part} to {10 * part + 10} % of the load": partial(_shown_bytes, part=part)
            for part in range(PARTS)
        },
        f"growth behind the first {WARM_UP * 10} %": lambda one: f"{one.growth() / MIB:,.1f} MiB",
        "seconds of load": lambda one: f"{one.seconds:,.0f}",
    }
    for label, shown in rows.items():
        table.add_row(label, *(shown(one) for one in found.values()))
    Console(width=100).print(table)
    for role, one in found.items():
        unusual = {kind: count for kind, count in one.kinds().items() if kind.startswith("failed")}
        if unusual:
            print(f"{role}: {', '.join(f'{count} {kind}' for kind, count in sorted(unusual.items()))}")


if __name__ == "__main__":
    sys.exit(main())
