"""Every tensor a layer stores: name, shape, dtype, bytes. The only place that spells a suffix (SPEC.md, 3).

All tensors are in design-matrix orientation: the intermediate dimension I comes first, ``down_proj`` is
transposed. So tensor parallelism slices dimension 0 of every tensor whose first dimension is I, and nothing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod

import torch

from compress_tools.format.schema import CenterPart, LayerSpec, Projection, ResidualPart, ResMoEFormat

CENTER = "resmoe_center"
CENTER_CODES = "resmoe_center_codes"
CENTER_SCALES = "resmoe_center_scales"
MASK = "resmoe_mask"
VALUES = "resmoe_values"
VALUE_CODES = "resmoe_value_codes"
ROW_VALUES = "resmoe_row_values"
ROW_VALUE_CODES = "resmoe_row_value_codes"
VALUE_SCALES = "resmoe_value_scales"
U = "resmoe_u"
V = "resmoe_v"
U_CODES = "resmoe_u_codes"
V_CODES = "resmoe_v_codes"
U_SCALES = "resmoe_u_scales"
V_SCALES = "resmoe_v_scales"
CODES = "resmoe_codes"
SCALES = "resmoe_scales"
BIAS = "resmoe_bias"

# What is held in the model's dtype, whatever that is.
_VALUE_SUFFIXES = (CENTER, VALUES, ROW_VALUES, U, V, BIAS)
_CODE_SUFFIXES = (CENTER_CODES, VALUE_CODES, ROW_VALUE_CODES, U_CODES, V_CODES, CODES)
_SCALE_SUFFIXES = (CENTER_SCALES, VALUE_SCALES, U_SCALES, V_SCALES, SCALES)
SUFFIXES = (*_VALUE_SUFFIXES, *_CODE_SUFFIXES, *_SCALE_SUFFIXES, MASK)
SCALE_DTYPE = "bfloat16"

# The center has no expert of its own: it rides under expert 0, a name that every vLLM loader maps (SPEC.md, 3.1).
CENTER_EXPERT = 0

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
}


def mask_row_bytes(hidden_size: int) -> int:
    """Bytes of one mask row: H bits, padded with zeros to whole 64-bit words."""
    return 8 * ceil(hidden_size / 64)


def code_row_bytes(bits: int, columns: int) -> int:
    """Bytes of one row of codes, padded with zeros to whole octets of columns."""
    return bits * ceil(columns / 8)


def num_groups(columns: int, group_size: int | None) -> int:
    """Scales of one row."""
    return 1 if group_size is None else ceil(columns / group_size)


def follows_model_dtype(suffix: str) -> bool:
    """Whether a loader holds the tensor in the model's dtype. Masks, codes and scales are held as stored."""
    return suffix in _VALUE_SUFFIXES


def is_scale(suffix: str) -> bool:
    """Whether the tensor holds scales of codes."""
    return suffix in _SCALE_SUFFIXES


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor of one layer.

    Attributes:
        expert: expert index, 0..E-1; None for what the whole layer shares.
        projection: the projection it is stored under; a tensor shared by a group is under the group's first.
        suffix: one of ``SUFFIXES``.
        shape: stored shape.
        dtype: stored dtype's name.
        codes: of rows of codes, the bits of one and the columns of a row.
    """

    expert: int | None
    projection: Projection
    suffix: str
    shape: tuple[int, ...]
    dtype: str
    codes: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def shared_tensors(fmt: ResMoEFormat, layer: LayerSpec) -> Iterator[TensorSpec]:
    """The tensors that all experts of a layer share: the center."""
    shape = fmt.intermediate_size, fmt.hidden_size
    for part in layer.center:
        for projection in part.projections:
            if part.method == "dense":
                yield TensorSpec(None, projection, CENTER, shape, fmt.dtype)
            else:
                yield from _coded(
                    None, projection, CENTER_CODES, CENTER_SCALES, *shape, bits=part.bits, group_size=part.group_size
                )


def expert_tensors(fmt: ResMoEFormat, layer: LayerSpec, expert: int) -> Iterator[TensorSpec]:
    """The tensors of one expert's residual."""
    for part in layer.of_expert(expert).residual:
        yield from _part_tensors(fmt, part, expert)
    if fmt.biases:
        for projection in fmt.names.projections:
            size = fmt.hidden_size if projection == "down_proj" else fmt.intermediate_size
            yield TensorSpec(expert, projection, BIAS, (size,), fmt.dtype)


def _part_tensors(fmt: ResMoEFormat, part: ResidualPart, expert: int) -> Iterator[TensorSpec]:
    size_i, size_h, first = fmt.intermediate_size, fmt.hidden_size, part.projections[0]
    if part.method == "quantized":
        for projection in part.projections:
            yield from _coded(
                expert, projection, CODES, SCALES, size_i, size_h, bits=part.bits, group_size=part.group_size
            )
    elif part.method == "low_rank" and part.factor_bits is None:
        yield TensorSpec(expert, first, U, (size_i, part.rank), fmt.dtype)
        for projection in part.projections:
            yield TensorSpec(expert, projection, V, (part.rank, size_h), fmt.dtype)
    elif part.method == "low_rank":
        yield from _coded(expert, first, U_CODES, U_SCALES, size_i, part.rank, bits=part.factor_bits)
        for projection in part.projections:
            yield from _coded(expert, projection, V_CODES, V_SCALES, part.rank, size_h, bits=part.factor_bits)
    else:
        for projection in part.projections:
            yield TensorSpec(expert, projection, MASK, (size_i, mask_row_bytes(size_h)), "uint8")
        if part.value_bits is not None:
            shape = size_i, num_groups(size_h, part.group_size)
            for projection in part.projections:
                yield TensorSpec(expert, projection, VALUE_SCALES, shape, SCALE_DTYPE)
        if part.method == "bitmap" and part.value_bits is None:
            yield TensorSpec(expert, first, VALUES, (part.values_per_expert,), fmt.dtype)
        elif part.method == "bitmap":
            coding = part.value_bits, part.values_per_expert
            yield TensorSpec(expert, first, VALUE_CODES, (code_row_bytes(*coding),), "uint8", coding)
        else:
            for projection in part.projections:
                if part.value_bits is None:
                    yield TensorSpec(expert, projection, ROW_VALUES, (size_i, part.values_per_row), fmt.dtype)
                else:
                    coding = part.value_bits, part.values_per_row
                    shape = size_i, code_row_bytes(*coding)
                    yield TensorSpec(expert, projection, ROW_VALUE_CODES, shape, "uint8", coding)


def _coded(
    expert: int | None,
    projection: Projection,
    codes: str,
    scales: str,
    rows: int,
    columns: int,
    *,
    bits: int,
    group_size: int | None = None,
) -> Iterator[TensorSpec]:
    yield TensorSpec(expert, projection, codes, (rows, code_row_bytes(bits, columns)), "uint8", (bits, columns))
    yield TensorSpec(expert, projection, scales, (rows, num_groups(columns, group_size)), SCALE_DTYPE)


def layer_tensors(fmt: ResMoEFormat, index: int) -> dict[str, TensorSpec]:
    """All tensors of a compressed layer by full name, in the order they are written."""
    layer = fmt.layers[index]
    specs = list(shared_tensors(fmt, layer))
    for expert in range(fmt.num_experts):
        specs.extend(expert_tensors(fmt, layer, expert))
    return {tensor_name(fmt, index, spec.expert, spec.projection, spec.suffix): spec for spec in specs}


def layer_bytes(fmt: ResMoEFormat, index: int) -> int:
    """Stored bytes of a compressed layer: center, residuals, masks and scales (SPEC.md, 5)."""
    layer = fmt.layers[index]
    total = sum(spec.nbytes for spec in shared_tensors(fmt, layer))
    for group in layer.expert_groups(fmt.num_experts):
        total += len(group.experts) * sum(spec.nbytes for spec in expert_tensors(fmt, layer, group.experts[0]))
    return total


def layer_params(fmt: ResMoEFormat, index: int) -> int:
    """Stored parameters of a compressed layer: center, kept values, factors and codes; masks and scales are none."""
    layer = fmt.layers[index]
    total = sum(_part_params(fmt, part) for part in layer.center)
    for group in layer.expert_groups(fmt.num_experts):
        total += len(group.experts) * sum(_part_params(fmt, part) for part in group.residual)
    return total + (fmt.num_experts * _bias_params(fmt) if fmt.biases else 0)


def _part_params(fmt: ResMoEFormat, part: CenterPart | ResidualPart) -> int:
    size_p, size_i, size_h = len(part.projections), fmt.intermediate_size, fmt.hidden_size
    if part.method == "bitmap":
        return part.values_per_expert
    if part.method == "bitmap_rows":
        return size_p * size_i * part.values_per_row
    if part.method == "low_rank":
        return part.rank * (size_i + size_p * size_h)
    return size_p * size_i * size_h


def _bias_params(fmt: ResMoEFormat) -> int:
    return (len(fmt.names.projections) - 1) * fmt.intermediate_size + fmt.hidden_size


def row_pointer_bytes(fmt: ResMoEFormat, index: int) -> int:
    """Bytes a loader adds in memory: one int32 row pointer per bitmap row of every expert (SPEC.md, 5)."""
    rows = sum(
        len(group.experts) * len(part.projections) * fmt.intermediate_size
        for group in fmt.layers[index].expert_groups(fmt.num_experts)
        for part in group.residual
        if part.method == "bitmap"
    )
    return 4 * rows


def group_map_bytes(fmt: ResMoEFormat, index: int) -> int:
    """Bytes a loader adds in memory to a layer of several groups: an int32 for each expert and group (SPEC.md, 5)."""
    groups = fmt.layers[index].groups
    return 4 * fmt.num_experts * len(groups) if groups and len(groups) > 1 else 0


def dense_layer_bytes(fmt: ResMoEFormat, itemsize: int | None = None) -> int:
    """Bytes of the same layer's experts before compression, at ``itemsize`` bytes per weight (default: dtype's)."""
    per_weight = DTYPES[fmt.dtype].itemsize if itemsize is None else itemsize
    matrices = len(fmt.names.projections) * fmt.intermediate_size * fmt.hidden_size
    biases = _bias_params(fmt) if fmt.biases else 0
    return fmt.num_experts * (matrices + biases) * per_weight


def tensor_name(fmt: ResMoEFormat, layer: int, expert: int | None, projection: Projection, suffix: str) -> str:
    """Full name of a tensor in the checkpoint."""
    index = CENTER_EXPERT if expert is None else expert
    return f"{fmt.names.expert_stem(layer, index)}.{fmt.names.projections[projection]}.{suffix}"


def is_resmoe_name(name: str) -> bool:
    """Whether a tensor name ends in a ResMoE suffix."""
    return name.rsplit(".", 1)[-1] in SUFFIXES
