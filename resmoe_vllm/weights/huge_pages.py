"""Memory for weights that a CPU reads whole for every token: in pages of 2 MB where Linux gives them.

One token's products run as fast as memory is read, and with pages of 4 KB a tenth of that time is spent on finding
them. Linux gives large pages where a process asks for them (``/sys/kernel/mm/transparent_hugepage/enabled`` says
``madvise`` or ``always``) before memory is written to; making them of small ones afterwards takes seconds for a GB.
"""

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

PAGE = 2**21
# Of which small pages would be left at both ends.
_SMALLEST = 2 * PAGE


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``; on a CPU large tensors begin at a large page and lie in such, but for what is left at the end.

    Args:
        shape: of the tensor.
        dtype: of its values.
        device: where it is.
    """
    size = math.prod(shape) * dtype.itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if device.type != "cpu" or size < _SMALLEST or advice is None:
        return torch.empty(shape, dtype=dtype, device=device)
    # Fresh memory: what malloc hands out may have small pages already.
    memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE
    # A kernel that was built without them refuses.
    with suppress(OSError):
        memory.madvise(advice, begin, size // PAGE * PAGE)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=begin).view(shape)
