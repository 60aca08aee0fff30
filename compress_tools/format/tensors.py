"""Every tensor a layer stores: name, shape, dtype, bytes (SPEC.md, 3).

All tensors are in design-matrix orientation: the intermediate dimension I comes first, ``down_proj`` is
transposed. So tensor parallelism slices dimension 0 of every tensor whose first dimension is I, and nothing else.
"""

from collections.abc import Iterator
from dataclasses import replace

from compress_tools.format.dtypes import DTYPES
from compress_tools.format.parts.base import Projection, Role, TensorSpec
from compress_tools.format.rest import ROW_SUFFIXES
from compress_tools.format.schema import LayerSpec, ResMoEFormat, part_classes

BIAS = "resmoe_bias"

# Every suffix of the format, and what it holds. Each part's own are in its file.
ROLES: dict[str, Role] = {
    BIAS: "values",
    **{suffix: role for part in part_classes() for suffix, role in part.roles.items()},
}

# The center has no expert of its own: it rides under expert 0, a name that every vLLM loader maps (SPEC.md, 3.1).
CENTER_EXPERT = 0


def follows_model_dtype(suffix: str) -> bool:
    """Whether a loader holds the tensor in the model's dtype. Masks, codes and scales are held as stored."""
    return ROLES.get(suffix) == "values"


def shared_tensors(fmt: ResMoEFormat, layer: LayerSpec) -> Iterator[TensorSpec]:
    """The tensors that all experts of a layer share: the center."""
    for part in layer.center:
        yield from part.tensors(fmt.sizes)


def expert_tensors(fmt: ResMoEFormat, layer: LayerSpec, expert: int) -> Iterator[TensorSpec]:
    """The tensors of one expert's residual."""
    for part in layer.of_expert(expert).residual:
        for spec in part.tensors(fmt.sizes):
            yield replace(spec, expert=expert)
    if fmt.biases:
        for projection in fmt.names.projections:
            size = fmt.hidden_size if projection == "down_proj" else fmt.intermediate_size
            yield TensorSpec(expert, projection, BIAS, (size,), fmt.dtype, "values")


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
    total = sum(part.params(fmt.sizes) for part in layer.center)
    for group in layer.expert_groups(fmt.num_experts):
        total += len(group.experts) * sum(part.params(fmt.sizes) for part in group.residual)
    return total + (fmt.num_experts * _bias_params(fmt) if fmt.biases else 0)


def _bias_params(fmt: ResMoEFormat) -> int:
    return (len(fmt.names.projections) - 1) * fmt.intermediate_size + fmt.hidden_size


def row_pointer_bytes(fmt: ResMoEFormat, index: int) -> int:
    """Bytes a loader adds in memory: one int32 row pointer per bitmap row of every expert (SPEC.md, 5)."""
    return sum(
        len(group.experts) * part.row_pointer_bytes(fmt.sizes)
        for group in fmt.layers[index].expert_groups(fmt.num_experts)
        for part in group.residual
    )


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
    suffix = name.rsplit(".", 1)[-1]
    return suffix in ROLES or suffix in ROW_SUFFIXES
