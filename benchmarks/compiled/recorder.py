"""Runs a layer's host code on a machine without a GPU: each launch is noted, and compiled or not, but never run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.compiled.cards import CARDS, Card
from resmoe_vllm.kernels.gpu import layer
from resmoe_vllm.kernels.gpu.launches import LayerLaunches


class _Driver:
    """What Triton asks a driver before it launches. A number for each card, so that each has a cache of its own."""

    def __init__(self, card: Card) -> None:
        self._card = card

    def get_current_target(self) -> GPUTarget:
        return self._card.target

    def get_current_device(self) -> int:
        return list(CARDS).index(self._card.name)

    def get_current_stream(self, device: int = 0) -> int:  # noqa: ARG002 -- Triton's own signature
        return 0


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: the function's name.
        variant: what Triton tells this kernel's variants apart by.
        block_m: rows of a block of pairs; None for kernels that have none.
        warps: of a block.
        compiled: what came out, if it was to be compiled.
        error: what the compiler said, if it failed.
        role: what the layer launches it for.
    """

    kernel: str
    variant: str
    block_m: int | None
    warps: int
    compiled: CompiledKernel | None = None
    error: str = ""
    role: str = ""


# by hash: a layer may keep what was compiled for it and launch that directly
_COMPILED: dict[str, Launch] = {}


@contextmanager
def recorded(card: Card, *, compile_kernels: bool) -> Iterator[list[Launch]]:
    """Launches inside of it, in order."""
    launches: list[Launch] = []
    plain: Callable[..., Any] = JITFunction.run
    item: Callable[..., Any] = CompiledKernel.__getitem__
    of_layer: Callable[..., None] = LayerLaunches.launch
    role = ""

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> CompiledKernel | None:  # noqa: ARG001
        given = dict(zip(self.arg_names, args, strict=False)) | options
        kernel, error = None, ""
        if compile_kernels:
            try:
                kernel = plain(self, *args, grid=grid, warmup=True, **options)
            except Exception as err:
                # whatever a compiler raises is a finding
                error = f"{type(err).__name__}: {str(err).strip()[:300]}"
        variant = "" if compile_kernels else _variant(self, args, options)
        warps = options.get("num_warps", 4)
        launch = Launch(self.fn.__name__, variant, given.get("BLOCK_M"), warps, kernel, error, role)
        launches.append(launch)
        if kernel is not None:
            _COMPILED[kernel.hash] = launch
        return kernel

    def launch_again(kernel: CompiledKernel, grid: Any) -> Callable[..., None]:  # noqa: ARG001 -- its signature
        def call(*args: Any, **options: Any) -> None:  # noqa: ARG001 -- its signature
            launches.append(replace(_COMPILED[kernel.hash], role=role))

        return call

    def named(self: LayerLaunches, key: tuple[object, ...], *arguments: Any, **options: Any) -> None:
        nonlocal role
        role = "-".join(part for part in key if isinstance(part, str))
        of_layer(self, key, *arguments, **options)

    driver.set_active(_Driver(card))
    JITFunction.run, CompiledKernel.__getitem__ = note, launch_again
    try:
        # blocks are fitted to what a card has, but the layer's tensors are on none
        with (
            patch.object(layer, "shared_memory", lambda _: card.block_bytes),
            patch.object(LayerLaunches, "launch", named),
        ):
            yield launches
    finally:
        JITFunction.run, CompiledKernel.__getitem__ = plain, item


def _variant(function: JITFunction, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """By Triton's own binder: types, alignment and values of what is known when the kernel is compiled."""
    *_, binder = function.device_caches[driver.active.get_current_device()]
    _, specialization, given = binder(*args, debug=False, **options)
    return str((function.fn.__name__, specialization, sorted((name, str(value)) for name, value in given.items())))
