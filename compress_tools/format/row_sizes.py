"""Bytes and scales of one packed row (SPEC.md, 3)."""

from math import ceil


def mask_row_bytes(hidden_size: int) -> int:
    """Bytes of one mask row: H bits, padded with zeros to whole 64-bit words."""
    return 8 * ceil(hidden_size / 64)


def code_row_bytes(bits: int, columns: int) -> int:
    """Bytes of one row of codes, padded with zeros to whole octets of columns."""
    return bits * ceil(columns / 8)


def num_groups(columns: int, group_size: int | None) -> int:
    """Scales of one row."""
    return 1 if group_size is None else ceil(columns / group_size)
