"""Throughput and memory of the original and the compressed model, each behind a real `vllm serve`.

    python -m benchmarks.serve                                         # a small model made here, and two compressed
    python -m benchmarks.serve --synthetic OLMoE-1B-7B --layers 8      # random weights at a true shape, 20 GB of disk
    python -m benchmarks.serve --model original=DIR --model small=DIR2 --rates 1 4 inf --json rows.json

The models are served one after the other, on the same machine, with no option but directory and port; the load comes
from vLLM's own client, `vllm bench serve`; besides the rates, one request at a time. Peak memory is that of the
server's whole process tree.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console

from benchmarks.harness.rows import Row, print_rows, write_rows
from benchmarks.harness.shapes import SHAPES, MoEShape
from benchmarks.models.prepared import compress, ensure_reference_model, expert_bytes_on_disk
from benchmarks.models.reference_models import PRESETS, preset_config
from benchmarks.models.synthetic_checkpoint import write_compressed, write_dense
from benchmarks.models.synthetic_layer import CODINGS
from benchmarks.serving.bench_client import Load, run_load
from benchmarks.serving.server import VllmServer
from compress_tools.errors import ConfigError, ResMoEError
from compress_tools.source.reader import CheckpointReader

MIB = 2**20
ON_DISK, RESIDENT, WEIGHT_LOAD = "experts on disk", "experts resident in the server", "weight load"
# Against the dense twin of a true shape: decoding one request at a time, expert memory, loading.
TARGET_DECODE, TARGET_RESIDENT, TARGET_LOAD = 1.5, 0.4, 1.0
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "resmoe" / "benchmarks"


def main(argv: list[str] | None = None) -> int:
    """Serve, load, print, write; the exit code."""
    args = parse(argv)
    console = Console(stderr=True)
    try:
        if args.model:
            models = dict(args.model)
        elif args.synthetic:
            models = make_synthetic(SHAPES[args.synthetic], args.layers, args.method or CODINGS, console)
        else:
            models = make_models(args.preset, console)
        check_lengths(models, args.input_len + args.output_len)
        rows = []
        for name, model_dir in models.items():
            console.print(f"{name}: starting vllm serve {model_dir}", highlight=False)
            with VllmServer(model_dir, console=console) as server:
                rows += measure(name, server, args, console)
        rows += compare(rows, list(models), targets=bool(args.synthetic))
    except ResMoEError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code
    print_rows(rows, title="vllm serve, one model after the other")
    if args.json:
        write_rows(rows, args.json)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", type=named_dir, metavar="NAME=DIR", help="repeatable")
    parser.add_argument("--preset", choices=PRESETS, default="demo", help="model to make when no --model is given")
    parser.add_argument(
        "--synthetic", choices=SHAPES, metavar="SHAPE", help=f"random models instead: {', '.join(SHAPES)}"
    )
    parser.add_argument("--method", action="append", choices=CODINGS, help="of the random models; default: all")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers of the random models")
    parser.add_argument("--rates", nargs="+", type=float, default=[1, 4, float("inf")], help="requests/s; or inf")
    parser.add_argument("--max-concurrency", type=int, help="requests in flight at most")
    parser.add_argument("--num-prompts", type=int, default=32, help="requests at each rate")
    parser.add_argument("--input-len", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--output-len", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    return parser.parse_args(argv)


def named_dir(text: str) -> tuple[str, Path]:
    """`NAME=DIR`, where DIR must exist."""
    name, equals, directory = text.partition("=")
    if not (name and equals and Path(directory).is_dir()):
        raise argparse.ArgumentTypeError(f"expected NAME=DIR with an existing directory, found {text!r}")
    return name, Path(directory)


def make_models(preset: str, console: Console) -> dict[str, Path]:
    """A reference model and two compressed ones, in the user's cache directory."""
    models = {name: CACHE / preset / name for name in ("original", "prune", "low-rank")}
    ensure_reference_model(preset_config(preset), models["original"], console)
    for method in ("prune", "low-rank"):
        compress(models["original"], models[method], "--method", method, "--retain-ratio", "0.25", console=console)
    return models


def make_synthetic(shape: MoEShape, layers: int, methods: Iterable[str], console: Console) -> dict[str, Path]:
    """A random original and what each of ``CODINGS`` would make of it, in the user's cache directory."""
    models = {name: CACHE / f"{shape.name}-{layers}" / name for name in ("original", *methods)}
    for name, path in models.items():
        if path.exists():
            console.print(f"{path} is there already; remove it to write it again", highlight=False)
        elif name == "original":
            path.parent.mkdir(parents=True, exist_ok=True)
            console.print(f"writing {path}", highlight=False)
            write_dense(path, shape, layers)
        else:
            console.print(f"writing {path}", highlight=False)
            write_compressed(path, models["original"], **CODINGS[name])
    return models


def check_lengths(models: dict[str, Path], tokens: int) -> None:
    """Refuse lengths that a model's context can't hold, before any server is started.

    Raises:
        ConfigError: names the model and its limit.
    """
    for name, model_dir in models.items():
        limit = CheckpointReader(model_dir).config.get("max_position_embeddings")
        if limit is not None and tokens > limit:
            raise ConfigError(
                f"{name}: --input-len and --output-len are {tokens} tokens together, its context holds {limit}"
            )


def measure(name: str, server: VllmServer, args: argparse.Namespace, console: Console) -> list[Row]:
    """Put every load on one running server; rows carry the model, the rate and the lengths."""
    rows = []

    def add(what: str, value: float, unit: str, **context: object) -> None:
        rows.append(Row(f"{name}: {what}", value, unit, context={"model": name, "metric": what, **context}))

    lengths = args.num_prompts, args.input_len, args.output_len
    loads = [Load(math.inf, *lengths, max_concurrency=1)]
    loads += [Load(rate, *lengths, args.max_concurrency) for rate in args.rates]
    for load in loads:
        console.print(f"{name}: {load.num_prompts} requests, {load}", highlight=False)
        result = run_load(server, load)
        context = {
            "rate": str(load.rate), "max_concurrency": load.max_concurrency, "num_prompts": args.num_prompts,
            "input_len": args.input_len, "output_len": args.output_len,
        }  # fmt: skip
        add(f"output at {load}", result.output_tokens_per_s, "tokens/s", **context)
        add(f"median TTFT at {load}", result.median_ttft_ms, "ms", **context)
        add(f"median TPOT at {load}", result.median_tpot_ms, "ms", **context)
        add(f"median ITL at {load}", result.median_itl_ms, "ms", **context)
    add(ON_DISK, expert_bytes_on_disk(Path(server.model)) / MIB, "MiB")
    add(RESIDENT, sum(server.resident_expert_bytes().values()) / MIB, "MiB")
    if server.weight_load_s is not None:
        add(WEIGHT_LOAD, server.weight_load_s, "s")
    add("start to healthy", server.startup_s, "s")
    add("peak memory of the server's processes", server.peak_rss_bytes / MIB, "MiB")
    return rows


def compare(rows: list[Row], models: list[str], *, targets: bool) -> list[Row]:
    """Every model against the first: decoding speed at each load, expert memory, loading time."""
    measured = {(row.context["model"], row.context["metric"]): row for row in rows}
    compared = []
    for name in models[1:]:
        for (model, metric), base in measured.items():
            own = measured.get((name, metric))
            if model != models[0] or own is None or not base.value:
                continue
            context = {**own.context, "against": model}
            if metric.startswith("median TPOT"):
                alone = base.context["max_concurrency"] == 1
                label = f"{name} against {model}: decoding speed{metric.removeprefix('median TPOT')}"
                target = TARGET_DECODE if targets and alone else None
                compared.append(_row(Row.at_least, label, base.value / own.value, target, context))
            elif metric in (RESIDENT, WEIGHT_LOAD):
                target = TARGET_RESIDENT if metric == RESIDENT else TARGET_LOAD
                label = f"{name} against {model}: {metric}"
                share = own.value / base.value
                compared.append(_row(Row.at_most, label, share, target if targets else None, context))
    return compared


def _row(met: Callable[..., Row], name: str, value: float, target: float | None, context: dict[str, object]) -> Row:
    return Row(name, value, "x", context=context) if target is None else met(name, value, "x", target, **context)


if __name__ == "__main__":
    sys.exit(main())
