"""What a ResMoE checkpoint holds, in numbers, from its config and headers alone."""

from dataclasses import dataclass
from pathlib import Path

from compress_tools.format.rest import row_names
from compress_tools.format.tensors import (
    dense_layer_bytes,
    group_map_bytes,
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
class RestInspection:
    """Matrices beside the routed experts that are stored in codes.

    Attributes:
        matrices: how many.
        bits: of a code.
        bytes_dense: decoded, in the checkpoint's dtype.
        bytes_disk: stored bytes.
    """

    matrices: int
    bits: int
    bytes_dense: int
    bytes_disk: int


@dataclass(frozen=True)
class Inspection:
    """A whole checkpoint.

    ``other_bytes`` counts every tensor that is no compressed expert's, uncompressed experts included; ``rest`` how many
    of these are stored in codes, and their bytes, decoded and stored.
    """

    model_type: str
    written_by: str
    format_version: int
    dtype: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    other_bytes: int
    layers: list[LayerInspection]
    rest: RestInspection | None = None


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
            fmt.layers[index].describe(),
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
        other_bytes=sum(_stored_bytes(checkpoint, name) for name in checkpoint.plain_names),
        layers=layers,
        rest=_inspect_rest(checkpoint),
    )


def _stored_bytes(checkpoint: ResMoECheckpoint, name: str) -> int:
    names = row_names(name) if name in checkpoint.fmt.rest_tensors else (name,)
    return sum(map(checkpoint.reader.nbytes, names))


def _inspect_rest(checkpoint: ResMoECheckpoint) -> RestInspection | None:
    rest = checkpoint.fmt.rest
    if rest is None:
        return None
    return RestInspection(
        len(rest.tensors),
        rest.bits,
        sum(map(checkpoint.plain_bytes, rest.tensors)),
        sum(_stored_bytes(checkpoint, name) for name in rest.tensors),
    )
