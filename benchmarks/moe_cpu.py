"""`python -m benchmarks.moe_cpu`: one MoE layer on the CPU, ResMoE against vLLM's own dense fused MoE.

Same process, same threads, same routing. Several layers' weights, more than the cache, are used in turn; routing is
fresh in every run. Dense is vLLM's grouped GEMM with its prepacked weights. Medians over runs, dense and ResMoE
taken alternately so that a change of the machine's speed meets both. Each row waits for a quiet machine, for as long as
``--patience`` lasts, and says whether it had one. Beside its time stands the time that reading its bytes would take at
what the read test delivered. All shapes with the default coders take 20 minutes with one thread.
"""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.harness.quiet import Noise, Probe, QuietMachine
from benchmarks.harness.routing import route
from benchmarks.harness.rows import Row, print_rows, write_rows
from benchmarks.harness.shapes import SHAPES, MoEShape
from benchmarks.models.synthetic_layer import CODINGS, synthetic_format, synthetic_layer
from compress_tools.format.tensors import layer_bytes, row_pointer_bytes
from resmoe_vllm.kernels.cpu.build import chosen_path

DEFAULT_TOKENS = (1, 4, 16, 64, 256, 1024)
# Fewer runs than the first only where one takes longer than a second.
RUNS, FEWEST_RUNS = 7, 3
METHODS: dict[str, dict[str, Any]] = {
    **CODINGS,
    "prune-8bit": {"method": "prune", "retain_ratio": 0.25, "value_bits": 8},
    "quantize-4bit-center-4bit": {"method": "quantize", "bits": 4, "center_bits": 4},
    "trellis-4bit-center-4bit": {"method": "trellis", "bits": 4, "center_bits": 4, "center_coder": "trellis"},
    **{f"quantize-{bits}bit": {"method": "quantize", "bits": bits, "center_bits": 8} for bits in (2, 3, 8)},
    **{f"trellis-{bits}bit": {"method": "trellis", "bits": bits, "center_bits": 8} for bits in (1, 2, 3)},
}


@dataclass(frozen=True)
class Target:
    """Speeds to be reached, as multiples of dense; ``_top2`` for a layer of few large experts (Mixtral)."""

    t1: float
    t16: float
    many: float
    t1_top2: float
    t16_top2: float
    many_top2: float

    def at(self, tokens: int, *, top2: bool) -> float | None:
        """What holds for that many tokens; None where there is no target of its own."""
        if tokens >= 64:
            return self.many_top2 if top2 else self.many
        by_tokens = {1: (self.t1, self.t1_top2), 16: (self.t16, self.t16_top2)}
        return by_tokens[tokens][top2] if tokens in by_tokens else None


FLOOR = 0.9
_FOUR_BITS = Target(2.5, 1.5, 1.0, 2.0, 1.2, 0.95)
TARGETS = {
    "quantize-4bit": _FOUR_BITS,
    "quantize-4bit-center-4bit": _FOUR_BITS,
    "trellis-4bit": _FOUR_BITS,
    "trellis-4bit-center-4bit": _FOUR_BITS,
    "low-rank-8bit": Target(2.8, 2.2, 1.5, 1.8, 2.2, 1.5),
    "low-rank": Target(1.8, 1.8, 1.3, 1.2, 1.8, 1.3),
    "prune": Target(1.3, 1.0, 0.9, 1.0, 1.0, 0.9),
}
# Of codes at T = 1: of what the read test delivers; and trellis codes' time, as a multiple of plain codes' own.
READ_SHARE, TRELLIS_TIME = 0.75, 1.10

Forward = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Measured:
    """One row before it is judged: times of each run in ms, and what was around them."""

    shape: MoEShape
    method: str
    tokens: int
    threads: int
    dense_ms: list[float]
    resmoe_ms: list[float]
    noise: Noise


def dense_forward(shape: MoEShape, layers: int, seed: int) -> Forward:
    """The dense CPU fused MoE of vLLM over random bf16 weights."""
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    weights = []
    for index in range(layers):
        generator = torch.Generator().manual_seed(seed + index)
        pair = []
        for rows, columns in ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)):
            line = (columns**-0.5 * torch.randn(rows, columns, generator=generator)).bfloat16()
            pair.append(cpu_prepack_moe_weight(line.expand(shape.experts, rows, columns).contiguous(), isa))
        weights.append(pair)

    def forward(index: int, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        out = torch.empty_like(x)
        w13, w2 = weights[index]
        cpu_fused_moe(out, x, w13, w2, None, None, topk_weights, topk_ids, "silu", isa, skip_weighted=False)
        return out

    return forward


def resmoe_forward(shape: MoEShape, method: str, layers: int, seed: int) -> Forward:
    """The plugin's kernel over random layers."""
    from resmoe_vllm.kernels.activation import SILU
    from resmoe_vllm.kernels.cpu.dispatch import bind

    fmt = synthetic_format(shape, layers=layers, **METHODS[method])
    made = (synthetic_layer(fmt, index, seed + index) for index in range(layers))
    kernels = [bind(layout.bind(tensors), SILU) for layout, tensors in made]

    def forward(index: int, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return kernels[index](x, topk_weights, topk_ids)

    return forward


def time_alternately(
    forwards: list[Forward], shape: MoEShape, tokens: int, layers: int, seconds: float
) -> list[list[float]]:
    """Milliseconds of each run, for each forward; every forward sees the same inputs."""
    generator = torch.Generator().manual_seed(tokens)
    times: list[list[float]] = [[] for _ in forwards]
    begin, run = time.perf_counter(), 0
    while True:
        x = torch.randn(tokens, shape.hidden, generator=generator).bfloat16()
        inputs = x, *route(shape, tokens, generator)
        slowest = 0.0
        for forward, kept in zip(forwards, times, strict=True):
            start = time.perf_counter()
            forward(run % layers, *inputs)
            taken = time.perf_counter() - start
            slowest = max(slowest, taken)
            if run >= 1:  # the first one warms up
                kept.append(1e3 * taken)
        runs, run = run, run + 1
        spent = time.perf_counter() - begin
        if runs >= (RUNS if slowest < 1 else FEWEST_RUNS) and spent >= seconds * len(forwards):
            return times


def read_bytes(shape: MoEShape, method: str, tokens: int) -> float:
    """Bytes that must be read for T tokens routed uniformly: center once, each expert that is hit once."""
    all_experts, one = (
        layer_bytes(fmt, 0) + row_pointer_bytes(fmt, 0)
        for fmt in (synthetic_format(own, **METHODS[method]) for own in (shape, replace(shape, experts=1)))
    )
    residual = (all_experts - one) / (shape.experts - 1)
    hit = 1 - (1 - shape.top_k / shape.experts) ** tokens
    return one - residual + hit * shape.experts * residual


@click.command()
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), help="Default: all.")
@click.option(
    "--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help=f"Default: {', '.join(CODINGS)}."
)
@click.option("--tokens", multiple=True, type=click.IntRange(min=1), help="Default: 1 4 16 64 256 1024.")
@click.option("--threads", multiple=True, type=click.IntRange(min=1), help="Default: as many as torch takes.")
@click.option("--layers", default=2, show_default=True, type=click.IntRange(min=1), help="Layers used in turn.")
@click.option("--seconds", default=0.7, show_default=True, help="At least so long for a row of each of the two.")
@click.option(
    "--patience", default=120.0, show_default=True, help="Seconds that waiting for a quiet machine may take in all."
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    help="Write the rows to FILE; rows that it has of other shapes, methods, tokens and threads stay.",
)
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the speeds as a table for a page, too.")
def main(  # noqa: PLR0913  click gives every option
    shapes: tuple[str, ...],
    methods: tuple[str, ...],
    tokens: tuple[int, ...],
    threads: tuple[int, ...],
    layers: int,
    seconds: float,
    patience: float,
    json_file: Path | None,
    *,
    as_markdown: bool,
) -> None:
    """Time one MoE layer, ResMoE against vLLM's dense kernel."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    threads = threads or (torch.get_num_threads(),)
    machines = {count: QuietMachine(count, patience / len(threads), say=click.echo) for count in threads}
    measured: list[Measured] = []
    for name in shapes or SHAPES:
        shape = SHAPES[name]
        # Mixtral's dense layer is 2.8 GB: one is more than any cache.
        used = 1 if shape.top_k == 2 else layers
        dense = dense_forward(shape, used, seed=1)
        for method in methods or CODINGS:
            # One method's forms at a time: a layer of Mixtral's takes up 0.8 GB in each.
            resmoe = resmoe_forward(shape, method, used, seed=2)
            for count in threads:
                torch.set_num_threads(count)
                for number in tokens or DEFAULT_TOKENS:
                    found = measure([dense, resmoe], shape, number, used, seconds, machines[count])
                    measured.append(Measured(shape, method, number, count, *found))
                    _echo(row(measured[-1], machines[count].best))
            del resmoe
            if json_file:
                _write(measured, machines, json_file)
        del dense
    rows = [*_rows(measured, machines), *comparisons(measured, machines)]
    print_rows(map(described, rows), f"MoE layer on the CPU, path {chosen_path()}, as a multiple of vLLM's dense speed")
    if as_markdown:
        click.echo(markdown(rows))
    if noisy := sum(row.context["noisy"] for row in rows):
        click.echo(
            f"{noisy} of {len(rows)} rows are noisy: other work was at hand, or the probes were slower than once"
        )


def measure(
    forwards: list[Forward], shape: MoEShape, tokens: int, layers: int, seconds: float, machine: QuietMachine
) -> tuple[list[float], list[float], Noise]:
    """Milliseconds of each dense and each ResMoE run, and what was around them."""
    (dense, resmoe), noise = machine.measure(lambda: time_alternately(forwards, shape, tokens, layers, seconds))
    return dense, resmoe, noise


def row(measured: Measured, best: Probe) -> Row:
    """Speed as a multiple of dense, against its target."""
    shape, method, tokens = measured.shape, measured.method, measured.tokens
    dense, resmoe = (torch.tensor(times) for times in (measured.dense_ms, measured.resmoe_ms))
    dense_ms, resmoe_ms = dense.median().item(), resmoe.median().item()
    read = read_bytes(shape, method, tokens)
    context = {
        "shape": shape.name,
        "method": method,
        "tokens": tokens,
        "threads": measured.threads,
        "path": chosen_path(),
        "dense_ms": dense_ms,
        "resmoe_ms": resmoe_ms,
        "bytes_bound_ms": 1e3 * read / 1e9 / best.read_gb_s,
        "dense_p20_p80_ms": dense.quantile(torch.tensor([0.2, 0.8])).tolist(),
        "resmoe_p20_p80_ms": resmoe.quantile(torch.tensor([0.2, 0.8])).tolist(),
        "runs": len(resmoe),
        "read_gb_s": read / resmoe_ms / 1e6,
        "share_of_bandwidth": read / resmoe_ms / 1e6 / best.read_gb_s,
        **measured.noise.context(best),
    }
    target = TARGETS[method].at(tokens, top2=shape.top_k == 2) if method in TARGETS else None
    return Row.at_least(_name(measured), dense_ms / resmoe_ms, "x", FLOOR if target is None else target, **context)


def comparisons(measured: list[Measured], machines: dict[int, QuietMachine]) -> list[Row]:
    """Codes' share of the read test at T = 1, and trellis codes' time beside plain codes'."""
    rows = {_name(one): row(one, machines[one.threads].best) for one in measured}
    kept = ("shape", "method", "tokens", "threads", "path", "probe_slowdown", "others_share", "noisy")
    found = []
    for one in measured:
        own = rows[_name(one)]
        context = {key: own.context[key] for key in kept}
        if one.tokens == 1 and one.method.startswith(("quantize", "trellis")):
            share = own.context["share_of_bandwidth"]
            found.append(Row.at_least(f"{own.name}: share of the read test", share, "", READ_SHARE, **context))
        plain = rows.get(_name(replace(one, method=one.method.replace("trellis", "quantize"))))
        if one.method.startswith("trellis") and plain is not None:
            context["noisy"] |= plain.context["noisy"]
            ratio = own.context["resmoe_ms"] / plain.context["resmoe_ms"]
            found.append(Row.at_most(f"{own.name}: time beside plain codes", ratio, "x", TRELLIS_TIME, **context))
    return found


def described(row: Row) -> Row:
    """The row with its times in its name, for people."""
    context, times = row.context, ""
    if "dense_ms" in context:
        times = (
            f"; dense {context['dense_ms']:.2f} ms, ResMoE {context['resmoe_ms']:.2f} ms, "
            f"bytes' bound {context['bytes_bound_ms']:.2f} ms"
        )
    return replace(row, name=f"{row.name}{times}{'; NOISY' if context['noisy'] else ''}")


def markdown(rows: list[Row]) -> str:
    """The speeds as tables for a page, one for each number of threads; a noisy row's in brackets."""
    speeds = [row for row in rows if "dense_ms" in row.context]
    tokens = sorted({row.context["tokens"] for row in speeds})
    lines = []
    for threads in sorted({row.context["threads"] for row in speeds}):
        head = f"{threads} thread{'s' if threads > 1 else ''}"
        lines += ["", f"| {head} | T = {' | '.join(map(str, tokens))} |", "|---" * (len(tokens) + 1) + "|"]
        cells: dict[tuple[str, str], dict[int, str]] = {}
        for row in speeds:
            if row.context["threads"] == threads:
                shown = f"({row.value:.2f})" if row.context["noisy"] else f"{row.value:.2f}"
                cells.setdefault((row.context["shape"], row.context["method"]), {})[row.context["tokens"]] = shown
        for (shape, method), own in cells.items():
            lines.append(f"| {shape}, {method} | {' | '.join(own.get(count, '') for count in tokens)} |")
    return "\n".join(lines)


def _name(measured: Measured) -> str:
    threads = f"{measured.threads} thread{'s' if measured.threads > 1 else ''}"
    return f"{measured.shape.name}, {measured.method}, T={measured.tokens}, {threads}"


def _rows(measured: Iterable[Measured], machines: dict[int, QuietMachine]) -> list[Row]:
    return [row(one, machines[one.threads].best) for one in measured]


def _write(measured: list[Measured], machines: dict[int, QuietMachine], file: Path) -> None:
    rows = [*_rows(measured, machines), *comparisons(measured, machines)]
    own = {row.name for row in rows}
    write_rows(rows, file, keep=lambda name: name not in own)


def _echo(row: Row) -> None:
    shown = described(row)
    verdict = "met" if row.met else "missed"
    click.echo(f"{shown.name}: {row.value:.2f}x, target {row.target}: {verdict}")


if __name__ == "__main__":
    main()
