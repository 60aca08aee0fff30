"""Bits in bytes: masks, and codes of 2, 3, 4 or 8 bits. Rows stay rows, so dimension 0 can be sliced (SPEC.md, 4)."""

from math import ceil

import numpy as np
import torch
from torch import Tensor

from compress_tools.format.row_sizes import code_row_bytes, mask_row_bytes


def pack_mask(keep: Tensor) -> Tensor:
    """Pack booleans ``[I, H]`` into uint8 ``[I, mask_row_bytes(H)]``; column c is bit ``c % 8`` of byte ``c // 8``."""
    size_i, size_h = keep.shape
    padded = torch.zeros(size_i, 8 * mask_row_bytes(size_h), dtype=torch.uint8, device=keep.device)
    padded[:, :size_h] = keep
    return _pack_plane(padded, 1)


def unpack_mask(mask: Tensor, hidden_size: int) -> Tensor:
    """Inverse of ``pack_mask``: uint8 ``[..., mask_row_bytes(H)]`` to bool ``[..., H]``, on the mask's device."""
    return _unpack_plane(mask, 1)[..., :hidden_size].view(torch.bool)


def mask_row_counts(mask: Tensor) -> Tensor:
    """Kept values per row: uint8 ``[..., bytes]`` to int64 ``[...]``."""
    table = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int64, device=mask.device)
    return table[mask.long()].sum(-1)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes ``[..., N]`` uint8, each below ``2**bits``, into uint8 ``[..., code_row_bytes(bits, N)]``.

    Column c is in byte ``c * bits // 8`` at bit ``c * bits % 8``. Three bits are two planes, one behind the other:
    the two low bits of all columns, then the high bit of all columns.
    """
    size = codes.shape[-1]
    padded = torch.zeros(*codes.shape[:-1], 8 * ceil(size / 8), dtype=torch.uint8, device=codes.device)
    padded[..., :size] = codes
    if bits == 3:
        return torch.cat([_pack_plane(padded & 3, 2), _pack_plane(padded >> 2, 1)], -1)
    return _pack_plane(padded, bits)


def unpack_codes(packed: Tensor, bits: int, size: int) -> Tensor:
    """Inverse of ``pack_codes``: uint8 ``[..., code_row_bytes(bits, N)]`` to uint8 ``[..., N]``, on its device."""
    if bits == 3:
        low = code_row_bytes(2, size)
        codes = _unpack_plane(packed[..., :low], 2) | _unpack_plane(packed[..., low:], 1) << 2
    else:
        codes = _unpack_plane(packed, bits)
    return codes[..., :size]


def _pack_plane(codes: Tensor, bits: int) -> Tensor:
    """``[..., n]`` codes of 1, 2, 4 or 8 bits, n a multiple of 8, to bytes; the first code lowest."""
    if bits == 8:
        return codes
    if bits == 1 and codes.device.type == "cpu":
        return torch.from_numpy(np.packbits(codes.numpy(), axis=-1, bitorder="little"))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    by_byte = codes.reshape(*codes.shape[:-1], codes.shape[-1] * bits // 8, 8 // bits)
    return (by_byte << shifts).sum(-1, dtype=torch.uint8)


def _unpack_plane(packed: Tensor, bits: int) -> Tensor:
    """Inverse of ``_pack_plane``."""
    if bits == 8:
        return packed
    if bits == 1 and packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, bitorder="little"))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(-2)
