"""Every tensor a layer stores: name, shape, dtype, bytes. The only place that spells a suffix (SPEC.md, 3).

All tensors are in design-matrix orientation: the intermediate dimension I comes first, ``down_proj`` is
transposed. So tensor parallelism slices dimension 0 of every tensor whose first dimension is I, and nothing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod

import torch

from compress_tools.format.schema import LayerSpec, Projection, ResMoEFormat

CENTER = "resmoe_center"
MASK = "resmoe_mask"
VALUES = "resmoe_values"
U = "resmoe_u"
V = "resmoe_v"
BIAS = "resmoe_bias"
SUFFIXES = (CENTER, MASK, VALUES, U, V, BIAS)

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


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor of one layer.

    Attributes:
        expert: expert index, 0..E-1; None for what the whole layer shares.
        projection: the projection it is stored under; a tensor shared by a group is under the group's first.
        suffix: one of ``SUFFIXES``.
        shape: stored shape.
        dtype: stored dtype's name.
    """

    expert: int | None
    projection: Projection
    suffix: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def shared_tensors(fmt: ResMoEFormat, layer: LayerSpec) -> Iterator[TensorSpec]:
    """The tensors that all experts of a layer share: the center."""
    for part in layer.center:
        for projection in part.projections:
            yield TensorSpec(None, projection, CENTER, (fmt.intermediate_size, fmt.hidden_size), fmt.dtype)


def expert_tensors(fmt: ResMoEFormat, layer: LayerSpec, expert: int) -> Iterator[TensorSpec]:
    """The tensors of one expert's residual."""
    size_i, size_h = fmt.intermediate_size, fmt.hidden_size
    for part in layer.residual:
        first = part.projections[0]
        if part.method == "bitmap":
            for projection in part.projections:
                yield TensorSpec(expert, projection, MASK, (size_i, mask_row_bytes(size_h)), "uint8")
            yield TensorSpec(expert, first, VALUES, (part.values_per_expert,), fmt.dtype)
        else:
            yield TensorSpec(expert, first, U, (size_i, part.rank), fmt.dtype)
            for projection in part.projections:
                yield TensorSpec(expert, projection, V, (part.rank, size_h), fmt.dtype)
    if fmt.biases:
        for projection in fmt.names.projections:
            size = size_h if projection == "down_proj" else size_i
            yield TensorSpec(expert, projection, BIAS, (size,), fmt.dtype)


def layer_tensors(fmt: ResMoEFormat, index: int) -> dict[str, TensorSpec]:
    """All tensors of a compressed layer by full name, in the order they are written."""
    layer = fmt.layers[index]
    specs = list(shared_tensors(fmt, layer))
    for expert in range(fmt.num_experts):
        specs.extend(expert_tensors(fmt, layer, expert))
    return {tensor_name(fmt, index, spec.expert, spec.projection, spec.suffix): spec for spec in specs}


def layer_bytes(fmt: ResMoEFormat, index: int) -> int:
    """Stored bytes of a compressed layer: center, residuals and masks (SPEC.md, 5)."""
    layer = fmt.layers[index]
    shared = sum(spec.nbytes for spec in shared_tensors(fmt, layer))
    return shared + fmt.num_experts * sum(spec.nbytes for spec in expert_tensors(fmt, layer, 0))


def layer_params(fmt: ResMoEFormat, index: int) -> int:
    """Stored parameters of a compressed layer: center, kept values and factors; masks are not parameters."""
    specs = layer_tensors(fmt, index).values()
    return sum(prod(spec.shape) for spec in specs if spec.suffix != MASK)


def row_pointer_bytes(fmt: ResMoEFormat, index: int) -> int:
    """Bytes a loader adds in memory: one int32 row pointer per bitmap row of every expert (SPEC.md, 5)."""
    rows = sum(
        len(part.projections) * fmt.intermediate_size for part in fmt.layers[index].residual if part.method == "bitmap"
    )
    return 4 * fmt.num_experts * rows


def dense_layer_bytes(fmt: ResMoEFormat, itemsize: int | None = None) -> int:
    """Bytes of the same layer's experts before compression, at ``itemsize`` bytes per weight (default: dtype's)."""
    per_weight = DTYPES[fmt.dtype].itemsize if itemsize is None else itemsize
    matrices = len(fmt.names.projections) * fmt.intermediate_size * fmt.hidden_size
    biases = (len(fmt.names.projections) - 1) * fmt.intermediate_size + fmt.hidden_size if fmt.biases else 0
    return fmt.num_experts * (matrices + biases) * per_weight


def tensor_name(fmt: ResMoEFormat, layer: int, expert: int | None, projection: Projection, suffix: str) -> str:
    """Full name of a tensor in the checkpoint."""
    index = CENTER_EXPERT if expert is None else expert
    return f"{fmt.names.expert_stem(layer, index)}.{fmt.names.projections[projection]}.{suffix}"


def is_resmoe_name(name: str) -> bool:
    """Whether a tensor name ends in a ResMoE suffix."""
    return name.rsplit(".", 1)[-1] in SUFFIXES
