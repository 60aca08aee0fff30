"""How published checkpoints store quantised matrices, and what the stored numbers mean.

Dtypes and sibling names decide, not config.json, whose block may be absent or wrong. All arithmetic is in fp32 and
rounded once, to bf16. Packed columns hold the first value in the low bits; packed integers are offset by half their
range; E2M1 is a table of 16.

| form | tensors | scales |
|---|---|---|
| fp8 | ``X`` F8_E4M3 or F8_E5M2 | ``X_scale_inv``, ``X_scale`` or ``.scale``: one, one a row, or one a block |
| int8 | ``X`` I8 | ``X_scale``, floating point: one, one a row, or one a group |
| mxfp4 (gpt-oss) | ``X_blocks`` U8 ``[E, R, C/32, 16]`` | ``X_scales`` U8, E8M0; the matrix is ``[E, C, R]`` |
| mxfp4 | ``X_packed`` U8, or ``X`` I8 or U8 (DeepSeek-V4), ``[R, C/2]`` | E8M0 for each 32 columns |
| nvfp4 | ``X_packed`` or ``X`` U8 ``[R, C/2]`` | F8_E4M3 for each 16 columns, and one F32 |
| packed int | ``X_packed`` I32 ``[R, C*bits/32]``, ``X_shape`` | ``X_scale`` for each group |
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

import torch
from torch import Tensor

from compress_tools.errors import CheckpointError

FP8 = ("F8_E4M3", "F8_E5M2")
BYTES = ("U8", "I8")
E8M0 = ("F8_E8M0", "U8")
FLOATS = ("F32", "F16", "BF16")
# Columns (and rows) that share a scale where the scales alone leave a choice: published sizes, the usual one first.
USUAL_BLOCKS = (128, 32, 16, 64, 256)
# What calibration left beside the weights; nothing here computes with quantised activations.
ACTIVATION_SUFFIXES = (
    "input_scale",
    "activation_scale",
    "input_global_scale",
    "output_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "input_zero_point",
)
_SCALE_SUFFIXES = ("_scale_inv", "_scale", "_scales", ".scale")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

Parts = Mapping[str, Tensor]


class Headers(Protocol):
    """What is known of stored tensors before any is read."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored shape."""
        ...

    def dtype(self, name: str) -> str:
        """Stored dtype as safetensors spells it."""
        ...

    def get(self, name: str) -> Tensor:
        """A tensor itself; asked for shapes that are stored as tensors, and nothing larger."""
        ...


@dataclass(frozen=True)
class StoredForm:
    """One matrix (or a stack of them, ``[E, R, C]``) that lies in a checkpoint as several tensors.

    Attributes:
        title: what people call the form.
        parts: stored tensor by role: ``values``, ``scales``, ``scale`` (of the scales), ``zero_points``.
        shape: of the decoded matrix.
        decode: the parts to bf16; of a stack also row by row, each part cut by its first dimension.
    """

    title: str
    parts: dict[str, str]
    shape: tuple[int, ...]
    decode: Callable[[Parts], Tensor]

    def row(self, parts: Parts, index: int) -> Tensor:
        """One matrix of a stack.

        Args:
            parts: the stored tensors whole, or anything that gives ``[index]``.
            index: of the first dimension.
        """
        return self.decode({role: tensor[index : index + 1] for role, tensor in parts.items()})[0]


def find_forms(names: Collection[str], headers: Headers, block: Sequence[int] | None = None) -> dict[str, StoredForm]:
    """The quantised matrices of a checkpoint.

    Args:
        names: of all tensors.
        headers: their shapes and dtypes.
        block: rows and columns that share an fp8 scale, where config.json says so.
    Returns:
        by the matrix's own name, under which an unquantised checkpoint would hold it.
    Raises:
        CheckpointError: values without scales, scales of no known form, or a form that is not read (GPTQ, AWQ, ...).
    """
    known, found = set(names), {}
    for name in sorted(known):
        form = _form_of(name, known, headers, block)
        if form is not None:
            found[form[0]] = form[1]
    return found


def is_activation_scale(name: str) -> bool:
    """Whether a tensor belongs to the source's quantised activations, which no decoded checkpoint has."""
    return name.endswith(ACTIVATION_SUFFIXES)


def _form_of(
    name: str, names: Collection[str], headers: Headers, block: Sequence[int] | None
) -> tuple[str, StoredForm] | None:
    dtype = headers.dtype(name)
    if name.endswith((".qweight", ".qzeros")):
        raise CheckpointError(f"{name!r} is stored by GPTQ or AWQ, which is not read; use the unquantised checkpoint")
    if name.endswith("_blocks") and dtype == "U8":
        return _gpt_oss(name, names, headers)
    if name.endswith("_packed"):
        own = name.removesuffix("_packed")
        if dtype == "I32":
            return own, _packed_int(own, name, names, headers)
        return own, _fp4(own, name, names, headers)
    scales = _scales_of(name, names)
    if dtype in FP8 and not name.endswith(_SCALE_SUFFIXES) and not is_activation_scale(name):
        if scales is None:
            raise CheckpointError(f"{name!r} is stored as {dtype} without a scale beside it; what it means is unknown")
        return name, _scaled("fp8", name, scales, headers, block)
    if dtype in BYTES and scales is not None and not name.endswith(_SCALE_SUFFIXES):
        if dtype == "I8" and headers.dtype(scales) in FLOATS:
            return name, _scaled("int8", name, scales, headers, None)
        return name, _fp4(name, name, names, headers)
    return None


def _scales_of(name: str, names: Collection[str]) -> str | None:
    stem = name.removesuffix(".weight")
    candidates = [f"{name}_scale_inv", f"{name}_scale", f"{name}_scales", *([f"{stem}.scale"] if stem != name else [])]
    return next((candidate for candidate in candidates if candidate in names), None)


def _required_scales(own: str, names: Collection[str]) -> str:
    scales = _scales_of(own, names)
    if scales is None:
        raise CheckpointError(f"{own!r} is stored packed, without scales beside it; download the checkpoint again")
    return scales


def _scaled(title: str, name: str, scales: str, headers: Headers, block: Sequence[int] | None) -> StoredForm:
    """Values times scales that cover the matrix by blocks: the whole, rows, groups of columns or rectangles."""
    shape, given = headers.shape(name), headers.shape(scales)
    grid = given
    if given in ((), (1,)):
        grid = (1,) * len(shape)
    elif len(given) == len(shape) - 1 and given == shape[:-1]:
        grid = (*given, 1)
    if len(grid) != len(shape) or len(shape) < 2:
        raise _mismatch(name, shape, scales, given)
    sizes: list[int] = []
    for dimension, (size, count) in enumerate(zip(shape, grid, strict=True)):
        # Stacked experts never share a scale grid, though one scale may serve all.
        usual = list(block)[dimension - len(shape)] if block and dimension >= len(shape) - 2 else None
        shared = _block_size(size, count, usual)
        if shared is None:
            raise _mismatch(name, shape, scales, given)
        sizes.append(shared)
    exponents = headers.dtype(scales) in E8M0

    def decode(parts: Parts) -> Tensor:
        values, factors = parts["values"].float(), _factors(parts["scales"], exponents=exponents)
        factors = factors.reshape(*factors.shape, 1) if factors.dim() == values.dim() - 1 else factors
        factors = factors.reshape((1,) * values.dim()) if factors.numel() == 1 else factors
        for dimension, size in enumerate(sizes):
            if factors.shape[dimension] not in (1, values.shape[dimension]):
                factors = factors.repeat_interleave(size, dimension).narrow(dimension, 0, values.shape[dimension])
        return (values * factors).bfloat16()

    per = "one scale" if grid == (1,) * len(shape) else "scales of " + "x".join(map(str, sizes[-2:]))
    return StoredForm(f"{title}, {per}", {"values": name, "scales": scales}, shape, decode)


def _block_size(size: int, count: int, usual: int | None) -> int | None:
    """Neighbours that share one of ``count`` scales of a dimension; None: no size gives that count."""
    if count == 1:
        return size
    if count == size:
        return 1
    even = size and count and size % count == 0
    candidates = [*([usual] if usual else []), *USUAL_BLOCKS, *([size // count] if even else [])]
    return next((own for own in candidates if ceil(size / own) == count), None)


def _gpt_oss(name: str, names: Collection[str], headers: Headers) -> tuple[str, StoredForm]:
    own = name.removesuffix("_blocks")
    scales, shape = f"{own}_scales", headers.shape(name)
    if scales not in names:
        raise CheckpointError(f"{name!r} has no {scales!r} beside it; download the checkpoint again")
    if len(shape) < 3 or shape[-1] != 16 or headers.shape(scales) != shape[:-1]:
        raise _mismatch(name, shape, scales, headers.shape(scales))

    def decode(parts: Parts) -> Tensor:
        values = _fp4_values(parts["values"])
        return (values * _factors(parts["scales"], exponents=True)[..., None]).flatten(-2).transpose(-1, -2).bfloat16()

    decoded = (*shape[:-3], 32 * shape[-2], shape[-3])
    return own, StoredForm("mxfp4, gpt-oss's blocks", {"values": name, "scales": scales}, decoded, decode)


def _fp4(own: str, name: str, names: Collection[str], headers: Headers) -> StoredForm:
    scales = _required_scales(own, names)
    parts, shape, given = {"values": name, "scales": scales}, headers.shape(name), headers.shape(scales)
    columns = 2 * shape[-1]
    group = _group_size(columns, given[-1]) if len(given) == len(shape) and given[:-1] == shape[:-1] else None
    if group not in (16, 32):
        raise _mismatch(name, shape, scales, given)
    exponents = headers.dtype(scales) in E8M0
    divisor, factor = f"{own}_global_scale", f"{own}_scale_2"
    extra = next((found for found in (divisor, factor) if found in names), None)
    if extra is not None:
        parts["scale"] = extra
    elif not exponents:
        raise CheckpointError(f"{own!r}: nvfp4 without {divisor!r} or {factor!r}; download the checkpoint again")

    def decode(stored: Parts) -> Tensor:
        factors = _factors(stored["scales"], exponents=exponents)
        if extra is not None:
            whole = stored["scale"].float().reshape(-1, *(1,) * (factors.dim() - 1))
            factors = factors / whole if extra == divisor else factors * whole
        values = _fp4_values(stored["values"])
        return (values.view(*factors.shape, group) * factors[..., None]).flatten(-2).bfloat16()

    title = f"{'mxfp4' if exponents else 'nvfp4'}, scales of {group} columns"
    return StoredForm(title, parts, (*shape[:-1], columns), decode)


def _packed_int(own: str, name: str, names: Collection[str], headers: Headers) -> StoredForm:
    scales, zeros, sizes = _required_scales(own, names), f"{own}_zero_point", f"{own}_shape"
    if f"{own}_g_idx" in names:
        raise CheckpointError(f"{own!r} is stored with reordered columns (g_idx), which is not read")
    packed, given = headers.shape(name), headers.shape(scales)
    # The packed columns don't tell how many bits a value has; without a stored shape it is the usual four.
    shape = tuple(headers.get(sizes).tolist()) if sizes in names else (*packed[:-1], 8 * packed[-1])
    bits = next((bits for bits in (4, 8) if ceil(shape[-1] / (32 // bits)) == packed[-1]), None)
    group = _group_size(shape[-1], given[-1]) if len(given) == len(shape) else None
    if bits is None or group is None or shape[:-1] != packed[:-1] or given[:-1] != packed[:-1]:
        raise _mismatch(name, packed, scales, given)
    parts = {"values": name, "scales": scales} | ({"zero_points": zeros} if zeros in names else {})

    def decode(stored: Parts) -> Tensor:
        factors = stored["scales"].float().repeat_interleave(group, -1)
        levels = _unpack_int32(stored["values"], bits)[..., : shape[-1]].float()
        if "zero_points" in stored:
            # Packed along the rows.
            zero = _unpack_int32(stored["zero_points"].T, bits).T[: len(levels)]
            levels = levels - zero.float().repeat_interleave(group, -1)
        else:
            levels = levels - 2 ** (bits - 1)
        return (levels * factors).bfloat16()

    return StoredForm(f"int{bits}, scales of {group} columns", parts, shape, decode)


def _group_size(columns: int, count: int) -> int | None:
    return columns // count if count and columns % count == 0 else None


def _mismatch(name: str, shape: tuple[int, ...], scales: str, given: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{name!r} {list(shape)} and its scales {scales!r} {list(given)} fit no known form of quantised weights"
    )


def _factors(scales: Tensor, *, exponents: bool) -> Tensor:
    """Scales in fp32; E8M0 is ``2 ** (byte - 127)``."""
    if not exponents:
        return scales.float()
    if scales.dtype == torch.uint8:
        return (scales.float() - 127).exp2()
    return (scales.view(torch.uint8).float() - 127).exp2()


def _fp4_values(packed: Tensor) -> Tensor:
    """Two E2M1 values a byte, the first in the low four bits: ``[..., n]`` to fp32 ``[..., 2n]``."""
    table = torch.tensor(_E2M1, device=packed.device)
    codes = packed.view(torch.uint8)
    pairs: Tensor = torch.stack([codes & 15, codes >> 4], -1)
    return table[pairs.flatten(-2).long()]


def _unpack_int32(packed: Tensor, bits: int) -> Tensor:
    """``[..., n]`` int32 to ``[..., n * 32 / bits]``, the first value in the low bits."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    values: Tensor = (packed[..., None] >> shifts) & (2**bits - 1)
    return values.flatten(-2)
