"""`python -m benchmarks.kernels.warm CARD SHAPE:METHOD:T...`: compiles what layers launch, into Triton's cache."""

import sys

import torch


def main() -> None:
    """Compile the named cells; what does not compile is said, and left to whoever runs it."""
    from benchmarks.compiled.cards import CARDS
    from benchmarks.compiled.recorder import recorded
    from benchmarks.harness.shapes import SHAPES
    from benchmarks.kernels.__main__ import methods
    from benchmarks.models.synthetic_layer import synthetic_format
    from resmoe_vllm.kernels.activation import SILU
    from resmoe_vllm.kernels.gpu import align
    from resmoe_vllm.ops import BoundLayer
    from resmoe_vllm.weights.layer_loader import BoundGroup
    from resmoe_vllm.weights.layout import make_layout

    # vLLM's own sorting of many pairs is no kernel of ours, and does not run on the CPU.
    align.MAX_PAIRS = sys.maxsize
    for cell in sys.argv[2:]:
        name, method, count = cell.split(":")
        shape = SHAPES[name]
        fmt = synthetic_format(shape, "bfloat16", **methods()[method])
        layout = make_layout(fmt, fmt.layers[0], tp_size=1, padded=True)
        tensors = [
            torch.empty(1 if shared else shape.experts, columns, dtype=getattr(torch, kind))
            for columns, kind, shared in layout.params.values()
        ]
        layer = BoundLayer([BoundGroup(layout.bind(tensors), None)], SILU, "cuda")
        tokens = int(count)
        with recorded(CARDS[sys.argv[1]], compile_kernels=True) as launches:
            x = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16)
            ids = torch.empty(tokens, shape.top_k, dtype=torch.int32)
            layer(x, torch.empty(tokens, shape.top_k), ids)
        for launch in launches:
            if launch.error:
                print(f"{cell} {launch.kernel}: {launch.error}", file=sys.stderr)


if __name__ == "__main__":
    main()
