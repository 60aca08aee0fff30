"""What a ResMoE checkpoint holds, in numbers, from its config and headers alone."""

from dataclasses import dataclass
from pathlib import Path

from compress_tools.format.schema import LayerSpec
from compress_tools.format.tensors import (
    dense_layer_bytes,
    group_map_bytes,
    is_resmoe_name,
    layer_bytes,
    row_pointer_bytes,
)
from compress_tools.stored.checkpoint import ResMoECheckpoint


@dataclass(frozen=True)
class LayerInspection:
    """One compressed layer's storage.

    Attributes:
        layer: decoder layer index.
        coding: center and residual in words.
        bytes_dense: the layer's experts before.
        bytes_disk: stored bytes.
        bytes_resident: bytes once loaded by the vLLM plugin (one rank).
    """

    layer: int
    coding: str
    bytes_dense: int
    bytes_disk: int
    bytes_resident: int


@dataclass(frozen=True)
class Inspection:
    """A whole checkpoint. ``other_bytes`` counts every tensor that is not ResMoE's, uncompressed experts included."""

    model_type: str
    written_by: str
    format_version: int
    dtype: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    other_bytes: int
    layers: list[LayerInspection]


def describe_coding(layer: LayerSpec) -> str:
    """A layer's coding in words: ``dense center + bitmap (1234 values, joint)``."""
    center = " + ".join(part.describe() for part in layer.center) or "no center"
    if layer.groups is None:
        return " + ".join([center, *(part.describe() for part in layer.residual)])
    groups = [
        f"{len(group.experts)} experts {' + '.join(part.describe() for part in group.residual)}"
        for group in layer.groups
    ]
    return f"{center} + [{'; '.join(groups)}]"


def inspect(path: str | Path) -> Inspection:
    """Open and describe a checkpoint.

    Raises:
        CheckpointError, FormatError: not a ResMoE checkpoint, or a broken one.
    """
    checkpoint = ResMoECheckpoint(path)
    fmt, reader = checkpoint.fmt, checkpoint.reader
    layers = [
        LayerInspection(
            index,
            describe_coding(fmt.layers[index]),
            dense_layer_bytes(fmt),
            layer_bytes(fmt, index),
            layer_bytes(fmt, index) + row_pointer_bytes(fmt, index) + group_map_bytes(fmt, index),
        )
        for index in sorted(fmt.layers)
    ]
    return Inspection(
        model_type=str(reader.config.get("model_type")),
        written_by=fmt.written_by,
        format_version=fmt.format_version,
        dtype=fmt.dtype,
        num_experts=fmt.num_experts,
        hidden_size=fmt.hidden_size,
        intermediate_size=fmt.intermediate_size,
        other_bytes=sum(reader.nbytes(name) for name in reader.names if not is_resmoe_name(name)),
        layers=layers,
    )
