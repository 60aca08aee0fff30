"""The symbols at least squared error, exactly: by C++ where it can be compiled, else by torch; the same symbols."""

import logging
import subprocess
from functools import cache

import torch
from torch import Tensor

from compress_tools.residuals.viterbi import native
from compress_tools.residuals.viterbi.plain_torch import torch_search

log = logging.getLogger(__name__)


def best_symbols(
    x: Tensor, bits: int, group_size: int | None = None, ratios: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Symbols whose levels are nearest to the rows.

    Args:
        x: int16 ``[I, N]``, ``to_fixed`` of the rows; N at least 1. A packed row ends with an octet: N is a multiple
            of 8 where the symbols are to be packed.
        bits: 1, 2, 3 or 4.
        group_size: columns of a group; None for the whole row. 12 or more; or 0: ratios are of single columns.
        ratios: fp32 ``[I, num_groups]``: what an error in the group before counts in this group's units, in the last
            group for the first; None where all count alike. With ``group_size`` 0 the same of columns, ``[I, N]``.
    Returns:
        symbols uint8 ``[I, N]`` and their levels int8 ``[I, N]``, on the rows' device.
    """
    width = x.shape[1] if group_size is None else group_size
    if ratios is None:
        ratios = torch.ones(len(x), -(-x.shape[1] // width), dtype=torch.float32, device=x.device)
    library = _library() if x.device.type == "cpu" else None
    if library is not None:
        return native.search(library, x, bits, width, ratios)
    return torch_search(x, bits, width, ratios)


@cache
def _library() -> "native.Library | None":
    try:
        return native.load()
    except (OSError, subprocess.CalledProcessError) as err:
        log.warning(
            "trellis codes are searched for by torch, 20 times as slow, same result: %s",
            getattr(err, "stderr", "") or err,
        )
        return None
