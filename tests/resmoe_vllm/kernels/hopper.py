"""Compiles the Triton kernels for an H200 down to machine code, on any machine: no GPU, no launch.

`python -m tests.resmoe_vllm.kernels.hopper [METHOD...]` prints one line for each kernel: the instructions and
barriers of its longest loop, registers, spilled and shared bytes, and how often the matrix units are used in its code.
Must run without TRITON_INTERPRET.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.harness.shapes import MoEShape
from benchmarks.kernels.layers import LAYER_MAKERS, make_layer
from resmoe_vllm.kernels.activation import ACTIVATIONS, SILU, Activation
from resmoe_vllm.kernels.gpu.block_sizes import default_config
from resmoe_vllm.kernels.gpu.launches import run_plan
from resmoe_vllm.kernels.gpu.plans import LayerPlan, Plan

# H of a real model, few rows: the code is the same for any I
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


def with_biases(plan: LayerPlan, activation: Activation) -> LayerPlan:
    """The plan with biases, and without a gate if the activation has none."""
    inner = torch.zeros(SHAPE.experts, SHAPE.intermediate, dtype=torch.bfloat16)
    outer = torch.zeros(SHAPE.experts, SHAPE.hidden, dtype=torch.bfloat16)
    (group,) = plan.groups
    gate = replace(group.gate, bias=inner) if activation.gated else Plan(None, None, None)
    group = replace(group, gate=gate, up=replace(group.up, bias=inner))
    return replace(plan, groups=[group], down_bias=outer)


def compile_plan(
    plan_of: Callable[[bool], LayerPlan], method: str, tokens: int, activation: Activation = SILU
) -> list[dict[str, Any]]:
    """Every kernel that a layer launches for ``tokens`` tokens, compiled: name, shared bytes, code."""
    built: list[dict[str, Any]] = []
    plain: Callable = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = plain(self, *args, grid=grid, warmup=True, **kwargs)
        built.append({"name": self.fn.__name__, "shared": kernel.metadata.shared, "asm": kernel.asm})

    driver.set_active(_Hopper())
    JITFunction.run = compile_only
    try:
        x = torch.zeros(tokens, SHAPE.hidden, dtype=torch.bfloat16)
        ids = torch.zeros(tokens, SHAPE.top_k, dtype=torch.int32)
        expert_map = torch.arange(SHAPE.experts, dtype=torch.int32)
        config = default_config(tokens, SHAPE.top_k, SHAPE.experts, frozenset({method}))
        weights = torch.ones(tokens, SHAPE.top_k)
        run_plan(x, weights, ids, plan_of(config.center_in_tile), activation, expert_map, config)
    finally:
        JITFunction.run = plain
    return built


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack, which is where spilled registers go) of one kernel."""
    dump = _tool_output(cubin, "cuobjdump", "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {dump}")
    return int(found[1]), int(found[2])


def longest_loop(cubin: bytes) -> tuple[int, int]:
    """(instructions, barriers) of one kernel's longest loop, loops inside of it counted once."""
    labels: dict[str, int] = {}
    code: list[str] = []
    longest: list[str] = []
    for line in _tool_output(cubin, "nvdisasm", "-c").splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(instruction[1])
            back = re.search(r"BRA.*`\((\.L\w+)\)", instruction[1])
            begin = labels.get(back[1], len(code)) if back else len(code)
            longest = max(longest, code[begin:], key=len)
    return len(longest), sum(bool(re.search(r"\bBAR\.", instruction)) for instruction in longest)


def _tool_output(cubin: bytes, tool: str, option: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Compile the named methods, or all; and one with biases, clamped SwiGLU, and without a gate."""
    methods = sys.argv[1:] or list(LAYER_MAKERS)
    for method in methods:
        layer = make_layer(SHAPE, method, "cpu", torch.bfloat16, seed=0)
        for tokens in (4, 1024):
            for kernel in compile_plan(lambda inside, own=layer: own.plan(center_in_tile=inside), method, tokens):
                _report(f"{method} T={tokens} {kernel['name']}", kernel)
    layer = make_layer(SHAPE, methods[0], "cpu", torch.bfloat16, seed=0)
    for name in ("swigluoai", "swiglustep", "relu2_no_mul"):
        activation = ACTIVATIONS[name]

        def plan_of(inside: bool, own: Any = layer, activation: Activation = activation) -> LayerPlan:
            return with_biases(own.plan(center_in_tile=inside), activation)

        for kernel in compile_plan(plan_of, methods[0], 4, activation):
            _report(f"{methods[0]} {name} T=4 {kernel['name']}", kernel)
    print(f"compiled for sm_90 by triton {triton.__version__}")


def _report(name: str, kernel: dict[str, Any]) -> None:
    shared, code = kernel["shared"], kernel["asm"]
    if shared > MAX_SHARED_BYTES:
        raise SystemExit(f"{name} needs {shared} bytes of shared memory, a block has {MAX_SHARED_BYTES}")
    registers, stack = resources(code["cubin"])
    loop, barriers = longest_loop(code["cubin"])
    products = code["ptx"].count("wgmma.mma_async") + code["ptx"].count("mma.sync")
    print(
        f"{name}: loop of {loop} instructions, {barriers} barriers, {registers} registers, "
        f"{stack} spilled, {shared} shared, {products} products",
        flush=True,
    )


if __name__ == "__main__":
    main()
