"""`python -m tests.resmoe_vllm.kernels.guarded`: layers whose tensors end where memory may not be read any more.

A read beyond one of them ends this process (SIGSEGV).
"""

import ctypes
import itertools
import mmap

import torch
from torch import Tensor

from resmoe_vllm.kernels.activation import SILU
from resmoe_vllm.kernels.cpu import native
from tests.resmoe_vllm.kernels.test_vllm_kernels import hidden_states, make_routing
from tests.resmoe_vllm.layers import bound_weights, layer_kinds, load_all, new_loader, store_layer

_LIBC = ctypes.CDLL(None, use_errno=True)
_KEPT: list[mmap.mmap] = []


def guarded(tensor: Tensor) -> Tensor:
    """A copy whose last byte is the last one before a page without access."""
    if not tensor.numel():
        return tensor
    pages = -(-tensor.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    _KEPT.append(memory)
    end = pages * mmap.PAGESIZE
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=end - tensor.nbytes)
    copy.copy_(tensor.flatten())
    if _LIBC.mprotect(ctypes.c_void_p(begin + end), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    return copy.view(tensor.shape)


def main() -> None:
    """Every kind of layer in every dtype, with biases, for one token and for many."""
    library = native.load()
    layers = 0
    sizes = ((33, 67), (9, 1100))  # without and with vectors of codes that lie inside a row, on every path
    for dtype, (rows, columns) in itertools.product(("float32", "bfloat16", "float16"), sizes):
        for spec in layer_kinds(rows, columns).values():
            layer = store_layer(spec, 4, rows, columns, dtype, biases=True)
            module, loader = new_loader(layer)
            load_all(module, loader, layer)
            for param in module.parameters():
                param.data = guarded(param.data)
            kernel = native.NativeKernel(library, bound_weights(module, loader), SILU)
            for routing in ("T1-KE", "T13-K2"):
                weights, ids = make_routing(4, routing)
                out = kernel(guarded(hidden_states(len(ids), columns, dtype)), guarded(weights), guarded(ids))
                if not out.isfinite().all():
                    raise SystemExit("not finite")
            layers += 1
    print(f"{layers} layers read nothing else")


if __name__ == "__main__":
    main()
