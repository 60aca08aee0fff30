"""The target of a compression, known before any weight is read: format block, shards, sizes, peak memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress_tools.config import CompressionConfig
from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.format.dtypes import DTYPES, WEIGHT_DTYPES
from compress_tools.format.schema import DRAFTS_VERSION, FORMAT_VERSION, LayerSpec, ResMoEFormat
from compress_tools.format.tensors import dense_layer_bytes, layer_bytes, layer_params, layer_tensors
from compress_tools.output.shard_names import group_by_bytes, shard_names
from compress_tools.residuals.recipes import uniform_spec
from compress_tools.source.layer_selection import select_layers
from compress_tools.source.moe_source import MoESource, open_source
from compress_tools.source.reader import CheckpointReader
from compress_tools.version import __version__


@dataclass(frozen=True)
class Shard:
    """One output file: tensors copied through, or one compressed layer.

    Attributes:
        filename: in the output directory.
        layer: decoder layer index, None for a shard of copied tensors.
        tensors: names of its tensors in the output, in the order in which they are written.
        copied: names of the same tensors in the source; empty for a layer, whose tensors are made.
    """

    filename: str
    layer: int | None
    tensors: tuple[str, ...]
    copied: tuple[str, ...] = ()


@dataclass(frozen=True)
class CompressionTarget:
    """What is to be made of a source: everything but the numbers.

    Attributes:
        source: the checkpoint that it is made from.
        fmt: the ``quantization_config`` block to be.
        shards: output shards, in order.
        expert_bytes_before: bytes of all routed experts in the source.
        expert_bytes_after: bytes of the same in the output: centers, residuals, masks and uncompressed layers.
        other_bytes: bytes of all other tensors, the same before and after.
        peak_memory_bytes: estimate for one layer: design matrices, cost matrices, coded tensors.
    """

    source: MoESource
    fmt: ResMoEFormat
    shards: tuple[Shard, ...]
    expert_bytes_before: int
    expert_bytes_after: int
    other_bytes: int
    peak_memory_bytes: int

    def summary(self) -> dict[str, Any]:
        """Sizes in parameters and bytes, and the peak memory, as plain data. Masks count as bytes, not as params."""
        dense = dense_layer_bytes(self.fmt, itemsize=1)
        compressed = sum(layer_params(self.fmt, layer) for layer in self.fmt.layers)
        untouched = (len(self.source.layers) - len(self.fmt.layers)) * dense
        before, after, other = self.expert_bytes_before, self.expert_bytes_after, self.other_bytes
        return {
            "moe_layers": len(self.source.layers),
            "layers_compressed": len(self.fmt.layers),
            "expert_params": {"before": dense * len(self.source.layers), "after": compressed + untouched},
            "expert_bytes": {"before": before, "after": after, "ratio": after / before},
            "total_bytes": {
                "before": before + other,
                "after": after + other,
                "ratio": (after + other) / (before + other),
            },
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def make_target(
    reader: CheckpointReader, config: CompressionConfig, specs: Mapping[int, LayerSpec] | None = None
) -> CompressionTarget:
    """Validate source against request and lay the output out. Reads no weight.

    Args:
        reader: the source checkpoint.
        config: the request.
        specs: how each layer is stored, by decoder layer index, in place of ``config``'s layers, method and center
            bits; default: ``uniform_spec`` for each of ``config.layers``.
    Raises:
        UnsupportedArchitectureError: not an MoE, or of an unknown family.
        CheckpointError: an expert is missing or misshapen; the source is already quantised.
        ConfigError: the request does not fit the model.
    """
    if "quantization_config" in reader.config:
        method = (reader.config["quantization_config"] or {}).get("quant_method")
        raise CheckpointError(
            f"{reader.path}: already quantised ({method!r}); compress the original checkpoint"
            + (", or `resmoe restore` it first" if method == "resmoe" else "")
        )
    source = open_source(reader)
    if specs is None:
        specs = _uniform_specs(source, config)
    elif unknown := set(specs) - set(source.layers):
        raise ConfigError(f"layers {sorted(unknown)} have no experts; MoE layers are {list(source.layers)}")
    if not specs:
        raise ConfigError("no layer is to be compressed")
    if config.center == "none" and (centered := [layer for layer, spec in specs.items() if spec.center]):
        raise ConfigError(f"layers {sorted(centered)} are to have a center, which --center none does not make")
    selected = sorted(specs)
    fmt = _format(source, specs)
    replaced = {name for layer in selected for name in source.expected(layer)}
    kept = [name for name in reader.names if name not in replaced]
    before = sum(reader.nbytes(name) for layer in source.layers for name in source.expected(layer))
    after = before - sum(reader.nbytes(name) for name in replaced) + sum(layer_bytes(fmt, layer) for layer in selected)
    other = sum(reader.nbytes(name) for name in reader.names) - before
    return CompressionTarget(
        source,
        fmt,
        _shards(source, fmt, kept, selected),
        before,
        after,
        other,
        _peak_memory(fmt, selected, config.workers),
    )


def _uniform_specs(source: MoESource, config: CompressionConfig) -> dict[int, LayerSpec]:
    sizes = source.sizes
    spec = uniform_spec(config, source.projections, sizes.intermediate_size, sizes.hidden_size)
    return dict.fromkeys(select_layers(config.layers, list(source.layers), source.drafts), spec)


def _format(source: MoESource, specs: Mapping[int, LayerSpec]) -> ResMoEFormat:
    reader, sizes = source.reader, source.sizes
    dtypes = {reader.dtype(name) for layer in specs for name in source.expected(layer)}
    if len(dtypes) != 1 or not dtypes <= set(WEIGHT_DTYPES):
        raise CheckpointError(
            f"{reader.path}: experts are stored as {sorted(dtypes)}; expected one of {sorted(WEIGHT_DTYPES)}"
        )
    drafts = {layer: name for layer, name in (source.names.drafts or {}).items() if layer in specs}
    return ResMoEFormat(
        format_version=DRAFTS_VERSION if drafts else FORMAT_VERSION,
        written_by=f"resmoe {__version__}",
        dtype=WEIGHT_DTYPES[dtypes.pop()],
        num_experts=sizes.num_experts,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        biases=source.architecture.biased,
        names=source.names.model_copy(update={"drafts": drafts or None}),
        layers=dict(sorted(specs.items())),
    )


def _shards(source: MoESource, fmt: ResMoEFormat, kept: list[str], selected: list[int]) -> tuple[Shard, ...]:
    groups = group_by_bytes(kept, source.reader.nbytes)
    names = iter(shard_names(len(groups) + len(selected)))
    copied = [Shard(next(names), None, tuple(map(source.output_name, group)), tuple(group)) for group in groups]
    made = [Shard(next(names), layer, tuple(layer_tensors(fmt, layer))) for layer in selected]
    return (*copied, *made)


def _peak_memory(fmt: ResMoEFormat, selected: list[int], workers: int) -> int:
    rows, columns = fmt.intermediate_size, len(fmt.names.projections) * fmt.hidden_size
    matrix = rows * columns
    experts = fmt.num_experts * matrix * DTYPES[fmt.dtype].itemsize
    # For each worker, fp32: an expert, its aligned form or its residual and what coding leaves; cost matrices.
    aligning = 4 * matrix + workers * (4 * 2 * matrix + 3 * 4 * rows * rows)
    coding = workers * (4 * 5 * matrix + 4 * 2 * min(rows, columns) ** 2)
    stored = max((layer_bytes(fmt, layer) for layer in selected), default=0)
    return experts + max(aligning, coding + stored)
