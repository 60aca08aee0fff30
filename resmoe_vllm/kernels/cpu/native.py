"""Calls csrc/fused_moe_cpu.cpp, the kernel of every coder on a CPU with AVX2, or ARM64's NEON.

Without a compiler or these, ``load`` says why and gives None, and the plain torch path, same result, serves instead.
"""

import ctypes
import functools
import logging
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress_tools.errors import KernelUnsupportedError
from resmoe_vllm.kernels.activation import Activation
from resmoe_vllm.kernels.cpu.build import build, chosen_path, missing_cpu_flags
from resmoe_vllm.kernels.cpu.structs import DTYPES, BoundStruct
from resmoe_vllm.weights.bound import ResMoEWeights

log = logging.getLogger(__name__)
# vLLM shows what is logged below its own name, and nothing else of this level.
told = logging.getLogger("vllm.resmoe")


@dataclass(frozen=True)
class Loaded:
    """What serves on this processor.

    Attributes:
        library: compiled; None where plain torch serves.
        words: kernel, path and how it came here, for people.
    """

    library: ctypes.CDLL | None
    words: str


def load() -> ctypes.CDLL | None:
    """The compiled library, or None with the reason logged.

    Raises:
        KernelUnsupportedError: a library that was built now decodes wrongly on this processor, never seen; or
            ``RESMOE_CPU_PATH`` names no path of this processor.
    """
    return loaded().library


@functools.cache
def loaded() -> Loaded:
    """``load``, and what a start says of it."""
    compiled: list[str] = []
    begun = time.perf_counter()
    found = open_or_reason(lambda say: open_library(str(build(say=say))), "C++ kernel, plain torch serves", compiled)
    if isinstance(found, str):
        return Loaded(None, f"plain torch: {found.strip().splitlines()[0]}")
    how = "compiled, tested and loaded" if compiled else "compiled and tested before, loaded"
    return Loaded(found, f"C++, path {chosen_path()}; {how} in {time.perf_counter() - begun:.1f} s")


def open_or_reason(
    opened: Callable[[Callable[[str], None]], ctypes.CDLL], without: str, compiled: list[str]
) -> ctypes.CDLL | str:
    """A library that is built where need be; or why there is none, which is logged.

    Args:
        opened: builds and opens it, telling before it compiles.
        without: what the log says is missing, and what serves in its place.
        compiled: gets what was told.
    Raises:
        KernelUnsupportedError: see ``load``.
    """

    def say(text: str) -> None:
        compiled.append(text)
        told.info("resmoe: %s", text)

    if missing := missing_cpu_flags():
        reason = f"the processor lacks {', '.join(missing)}"
        log.warning("resmoe: no %s: %s", without, reason)
        return reason
    try:
        return opened(say)
    except (OSError, subprocess.CalledProcessError) as err:
        detail: str = getattr(err, "stderr", "") or str(err)
        log.warning("resmoe: no %s, slower, same result: %s", without, detail)
        return detail


def open_library(path: str) -> ctypes.CDLL:
    """A built library, ready to be called."""
    library = ctypes.CDLL(path)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.resmoe_fused_moe.argtypes = [
        pointer,
        pointer,
        ctypes.c_int32,
        size,
        pointer,
        pointer,
        size,
        pointer,
        pointer,
        ctypes.c_int,
    ]
    return library


class NativeKernel:
    """One layer, or group of experts, bound to the library.

    Args:
        library: ``load``'s.
        weights: in one dtype or codes, contiguous, on the CPU.
        activation: the experts'.
    """

    def __init__(self, library: ctypes.CDLL, weights: ResMoEWeights, activation: Activation) -> None:
        # Building the struct takes longer than a small layer's forward; so does finding things that others have pushed
        # out of the caches, hence the function and the address.
        self._bound = BoundStruct(weights, activation)
        self._address = ctypes.addressof(self._bound.struct)
        self._run = library.resmoe_fused_moe

    def __call__(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None = None) -> Tensor:
        """See ``fused_moe_ref``; sums and activations in fp32."""
        x, topk_ids, topk_weights = x.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
        # Of torch only what is needed is called.
        if topk_ids.dtype is not torch.int32:
            topk_ids = topk_ids.int()
        if topk_weights.dtype is not torch.float32:
            topk_weights = topk_weights.float()
        if expert_map is not None:
            expert_map = expert_map.int().contiguous()
        tokens, top_k = topk_ids.shape
        out = torch.empty_like(x)
        failed = self._run(
            self._address,
            x.data_ptr(),
            DTYPES[x.dtype],
            tokens,
            topk_ids.data_ptr(),
            topk_weights.data_ptr(),
            top_k,
            None if expert_map is None else expert_map.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise KernelUnsupportedError(f"resmoe's C++ kernel does not know dtype number {self._bound.struct.dtype}")
        return out
