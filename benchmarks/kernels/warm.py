"""`python -m benchmarks.kernels.warm CARD SHAPE:METHOD:T...`: compiles what layers launch, into Triton's cache."""

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence


def side_by_side(commands: Iterable[Sequence[str]]) -> None:
    """Run compiling commands at once, none of which needs the GPU, and wait for all."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for process in [subprocess.Popen(command, env=environment) for command in commands]:
        process.wait()


def main() -> None:
    """Compile the named cells; what does not compile is said, and left to whoever runs it."""
    from benchmarks.compiled.cards import CARDS
    from benchmarks.compiled.layers import matrix_call, unwritten_groups
    from benchmarks.compiled.recorder import recorded
    from benchmarks.harness.shapes import SHAPES
    from benchmarks.kernels.__main__ import methods
    from benchmarks.models.synthetic_layer import synthetic_format
    from resmoe_vllm.kernels.activation import SILU
    from resmoe_vllm.kernels.gpu import align
    from resmoe_vllm.ops import BoundLayer

    # vLLM's own sorting of many pairs is no kernel of ours, and does not run on the CPU.
    align.MAX_PAIRS = sys.maxsize
    for cell in sys.argv[2:]:
        name, method, count = cell.split(":")
        shape = SHAPES[name]
        layer = BoundLayer(unwritten_groups(synthetic_format(shape, "bfloat16", **methods()[method])), SILU, "cuda")
        with recorded(CARDS[sys.argv[1]], compile_kernels=True) as launches:
            matrix_call(layer, shape, int(count), "bfloat16")
        for launch in launches:
            if launch.error:
                print(f"{cell} {launch.kernel}: {launch.error}", file=sys.stderr)


if __name__ == "__main__":
    main()
