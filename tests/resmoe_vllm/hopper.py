"""Compiles the Triton kernels for an H200 down to machine code, on any machine: no GPU, no launch.

`python -m tests.resmoe_vllm.hopper [KIND...]` prints one line for each kernel: registers, spills, shared memory.
Must run without TRITON_INTERPRET.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.shapes import MoEShape
from compress_tools.format.schema import ExpertNames, LayerSpec, ResMoEFormat
from resmoe_vllm.kernels import triton_moe
from resmoe_vllm.layout import layout_key, parse_layout

# H of a real model, few rows: code is the same for any I
SHAPE = MoEShape("compiled", hidden=2048, intermediate=128, experts=4, top_k=2, layers=1)
# a Hopper block may use this much shared memory
MAX_SHARED_BYTES = 232448


class _Hopper:
    """What Triton asks a driver while it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_layer(spec: LayerSpec, tokens: int, dtype: torch.dtype = torch.bfloat16) -> list[dict[str, Any]]:
    """Every kernel that a layer launches for ``tokens`` tokens, compiled: name, shared bytes, PTX."""
    fmt = ResMoEFormat(
        written_by="tests",
        dtype="bfloat16",
        num_experts=SHAPE.experts,
        hidden_size=SHAPE.hidden,
        intermediate_size=SHAPE.intermediate,
        names=ExpertNames(
            expert="model.layers.{layer}.mlp.experts.{expert}",
            projections={name: name for name in ("gate_proj", "up_proj", "down_proj")},
        ),
        layers={0: spec},
    )
    layout = parse_layout(layout_key(fmt, spec, tp_size=1))
    kinds = {"float32": dtype, "float16": dtype, "bfloat16": dtype}
    tensors = [
        torch.zeros(
            1 if shared else SHAPE.experts,
            columns,
            dtype=getattr(torch, kind) if "scales" in name else kinds.get(kind, getattr(torch, kind)),
        )
        for name, (columns, kind, shared) in layout.params.items()
    ]
    built: list[dict[str, Any]] = []
    plain: Callable = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = plain(self, *args, grid=grid, warmup=True, **kwargs)
        built.append({"name": self.fn.__name__, "shared": kernel.metadata.shared, "asm": kernel.asm})

    driver.set_active(_Hopper())
    JITFunction.run = compile_only
    try:
        x = torch.zeros(tokens, SHAPE.hidden, dtype=dtype)
        ids = torch.zeros(tokens, SHAPE.top_k, dtype=torch.int32)
        expert_map = torch.arange(SHAPE.experts, dtype=torch.int32)
        triton_moe.fused_moe(x, torch.ones(tokens, SHAPE.top_k), ids, tensors, layout, "silu", expert_map)
    finally:
        JITFunction.run = plain
    return built


def main() -> None:
    """Compile the named kinds of layers, or all."""
    from tests.resmoe_vllm.layers import layer_kinds

    kinds = layer_kinds(SHAPE.intermediate, SHAPE.hidden)
    for kind in sys.argv[1:] or kinds:
        for tokens in (4, 1024):
            for kernel in compile_layer(kinds[kind], tokens):
                shared, ptx = kernel["shared"], kernel["asm"]["ptx"]
                if shared > MAX_SHARED_BYTES:
                    raise SystemExit(f"{kind}, {tokens} tokens: {kernel['name']} needs {shared} bytes of shared memory")
                products = ptx.count("wgmma.mma_async") + ptx.count("mma.sync")
                print(f"{kind} T={tokens} {kernel['name']}: {shared} bytes shared, {products} products", flush=True)
    print(f"compiled for sm_90 by triton {triton.__version__}")


if __name__ == "__main__":
    main()
