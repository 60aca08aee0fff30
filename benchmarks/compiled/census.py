"""`python -m benchmarks.compiled.census`: which variants of the kernels a layer meets, by the number of tokens.

Triton compiles a kernel anew for each set of types, alignments and compile-time values, and while it does so requests
wait. Here the host's code runs for every number of tokens, without a GPU; launches are noted, nothing is compiled.
Those that the layer's warm-up does not meet (without one: that vLLM's captured graphs don't) are the ones that a
request would wait for.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from benchmarks.harness.shapes import MoEShape
    from resmoe_vllm.ops import BoundLayer

MOST_TOKENS = 16384
# What vLLM captures graphs of by default, and the largest step of its profile run.
CAPTURED = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16), 8192)


def all_tokens() -> list[int]:
    """Every number up to 1100, then close enough to meet each class, up to ``MOST_TOKENS``."""
    return [*range(1, 1100), *range(1100, 4500, 17), *range(4500, MOST_TOKENS, 211), MOST_TOKENS]


def variants(
    kernel: "BoundLayer", shape: "MoEShape", tokens: Iterable[int], dtype: str = "bfloat16", card: str = "sm_90"
) -> dict[str, int]:
    """The first number of tokens that meets each variant; in a process without TRITON_INTERPRET."""
    from benchmarks.compiled.cards import CARDS
    from benchmarks.compiled.layers import matrix_call
    from benchmarks.compiled.recorder import recorded

    first: dict[str, int] = {}
    for count in tokens:
        with recorded(CARDS[card], compile_kernels=False) as launches:
            matrix_call(kernel, shape, count, dtype)
        for launch in launches:
            first.setdefault(launch.variant, count)
    return first


def warmed(
    kernel: "BoundLayer", shape: "MoEShape", dtype: str = "bfloat16", card: str = "sm_90"
) -> frozenset[str] | None:
    """The variants that the layer's own warm-up meets; None where it has none."""
    from benchmarks.compiled.cards import CARDS
    from benchmarks.compiled.recorder import recorded

    warm_up = getattr(kernel, "warm_up", None)
    if warm_up is None:
        return None
    with recorded(CARDS[card], compile_kernels=False) as launches:
        warm_up(shape.top_k, getattr(torch, dtype), torch.device("cpu"), None)
    return frozenset(launch.variant for launch in launches)


def with_vllm_align() -> torch.library.Library | None:
    """As where vLLM's CUDA build is installed: its sorting of pairs is there, and does nothing here.

    Returns:
        what holds the operator; None without vLLM, or where the operator is really there.
    """
    if importlib.util.find_spec("vllm") is None or hasattr(torch.ops._moe_C, "moe_align_block_size"):
        return None
    library = torch.library.Library("_moe_C", "FRAGMENT")
    library.define(
        "moe_align_block_size(Tensor ids, int experts, int block, Tensor! sorted, Tensor! blocks, Tensor! padded, "
        "Tensor? expert_map=None, Tensor? scatter=None) -> ()"
    )
    library.impl("moe_align_block_size", lambda *given: None, "CPU")  # noqa: ARG005 -- as the schema says
    return library


def main(argv: list[str] | None = None) -> int:
    """Count and print; 0."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("benchmarks.compiled.census: unset TRITON_INTERPRET, which replaces the launches", file=sys.stderr)
        return 2
    from benchmarks.compiled.layers import MATRIX_METHODS, MATRIX_SHAPES, matrix_layer
    from benchmarks.models.synthetic_layer import CODINGS

    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled.census", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", nargs="+", choices=list(MATRIX_SHAPES), default=list(MATRIX_SHAPES), metavar="NAME")
    parser.add_argument("--method", nargs="+", choices=list(MATRIX_METHODS), default=list(CODINGS), metavar="NAME")
    options = parser.parse_args(argv)
    vllm = with_vllm_align()
    print("pairs sorted by", "our kernel alone" if vllm is None else "vLLM where there are many, our kernel elsewhere")
    for name in options.shape:
        for method in options.method:
            shape = MATRIX_SHAPES[name]
            kernel = matrix_layer(shape, method, "bfloat16")
            met = variants(kernel, shape, all_tokens())
            own = warmed(kernel, shape)
            warm = frozenset(variants(kernel, shape, CAPTURED)) if own is None else own
            late = sorted(first for variant, first in met.items() if variant not in warm)
            print(
                f"{name} {method}: {len(met)} variants up to T={MOST_TOKENS}, {len(warm)} "
                f"{'where graphs are captured' if own is None else 'in the warm-up'}, "
                f"{len(late)} met later{f', first at T={late}' if late else ''}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
