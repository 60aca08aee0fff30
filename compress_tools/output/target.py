"""The target of a compression, known before any weight is read: format block, shards, sizes, peak memory."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

from compress_tools.config import CompressionConfig
from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.format.dtypes import DTYPES, WEIGHT_DTYPES, WeightDtype
from compress_tools.format.rest import row_bytes, row_names
from compress_tools.format.schema import CodedRest, LayerSpec, ResMoEFormat, version_for
from compress_tools.format.tensors import dense_layer_bytes, layer_bytes, layer_params, layer_tensors
from compress_tools.output.shard_names import group_by_bytes, shard_names
from compress_tools.output.trusted_code import missing_code, must_be_trusted
from compress_tools.residuals.recipes import uniform_spec
from compress_tools.source.layer_selection import select_layers
from compress_tools.source.moe_source import MoESource, open_source
from compress_tools.source.reader import CheckpointReader
from compress_tools.source.rest import rest_matrices
from compress_tools.version import __version__


@dataclass(frozen=True)
class Shard:
    """One output file: tensors copied through, or one compressed layer.

    Attributes:
        filename: in the output directory.
        layer: decoder layer index, None for a shard of copied tensors.
        tensors: names of its tensors in the output, in the order in which they are written.
        copied: names of the tensors in the source that it is made from; empty for a layer, whose tensors are made.
        names: what each of those is called in the output where it is not stored in codes.
    """

    filename: str
    layer: int | None
    tensors: tuple[str, ...]
    copied: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class CompressionTarget:
    """What is to be made of a source: everything but the numbers.

    Attributes:
        source: the checkpoint that it is made from.
        fmt: the ``quantization_config`` block to be.
        shards: output shards, in order.
        expert_bytes_before: bytes of all routed experts in the source.
        expert_bytes_after: bytes of the same in the output: centers, residuals, masks and uncompressed layers.
        other_bytes: bytes of all other tensors in the source; an output layer that is written out counts too.
        other_bytes_after: bytes of the same in the output: fewer where some are stored in codes.
        peak_memory_bytes: estimate for one layer: design matrices, cost matrices, coded tensors.
    """

    source: MoESource
    fmt: ResMoEFormat
    shards: tuple[Shard, ...]
    expert_bytes_before: int
    expert_bytes_after: int
    other_bytes: int
    other_bytes_after: int
    peak_memory_bytes: int

    def copied_bytes(self, shard: Shard) -> int:
        """Bytes of the tensors of a shard of copied ones."""
        copied = zip(shard.names, shard.copied, strict=True)
        return sum(_stored_bytes(self.source, self.fmt, name, own) for name, own in copied)

    def remarks(self) -> list[str]:
        """What a user should know of source and target before the work."""
        dtypes = self.source.dtypes(self.fmt.layers)
        found = self.source.remarks()
        if len(dtypes) > 1:
            mixed = ", ".join(f"{dtype} (first {name})" for dtype, name in dtypes.items())
            found.append(f"experts are stored in {mixed}; what is made of them is stored in {self.fmt.dtype}")
        reader = self.source.reader
        if must_be_trusted(reader.path, reader.config):
            missing = missing_code(reader.path, reader.config)
            lacking = f", and lacks {', '.join(missing)}" if missing else ""
            found.append(f"the model loads only with Python code of its own (--trust-remote-code){lacking}")
        return found

    def summary(self) -> dict[str, Any]:
        """Sizes in parameters and bytes, and the peak memory, as plain data. Masks count as bytes, not as params."""
        dense = dense_layer_bytes(self.fmt, itemsize=1)
        compressed = sum(layer_params(self.fmt, layer) for layer in self.fmt.layers)
        untouched = (len(self.source.layers) - len(self.fmt.layers)) * dense
        before, after, other = self.expert_bytes_before, self.expert_bytes_after, self.other_bytes
        whole, left = before + other, after + self.other_bytes_after
        return {
            "moe_layers": len(self.source.layers),
            "layers_compressed": len(self.fmt.layers),
            "expert_params": {"before": dense * len(self.source.layers), "after": compressed + untouched},
            "expert_bytes": {"before": before, "after": after, "ratio": after / before},
            **(self._rest() if self.fmt.rest is not None else {}),
            "total_bytes": {"before": whole, "after": left, "ratio": left / whole},
            "peak_memory_bytes": self.peak_memory_bytes,
        }

    def _rest(self) -> dict[str, Any]:
        before, after = self.other_bytes, self.other_bytes_after
        return {"other_bytes": {"before": before, "after": after, "ratio": after / before}}


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
    copied = source.copied(selected)
    fmt = _format(source, specs, copied, config)
    before = sum(reader.nbytes(name) for layer in source.layers for name in source.expected(layer))
    dense = sum(reader.nbytes(name) for layer in source.layers if layer not in specs for name in source.expected(layer))
    after = dense + sum(layer_bytes(fmt, layer) for layer in selected)
    other = sum(map(reader.nbytes, copied.values())) - dense
    stored = sum(_stored_bytes(source, fmt, name, own) for name, own in copied.items()) - dense
    return CompressionTarget(
        source,
        fmt,
        _shards(source, fmt, copied, selected),
        before,
        after,
        other,
        stored,
        _peak_memory(fmt, selected, config.workers),
    )


def widest(dtypes: Collection[str]) -> WeightDtype:
    """The dtype that holds all values of some dtypes exactly; they are named as safetensors spells them."""
    found = reduce(torch.promote_types, (DTYPES[WEIGHT_DTYPES[dtype]] for dtype in dtypes))
    return next(name for name in WEIGHT_DTYPES.values() if DTYPES[name] == found)


def _uniform_specs(source: MoESource, config: CompressionConfig) -> dict[int, LayerSpec]:
    sizes = source.sizes
    spec = uniform_spec(config, source.projections, sizes.intermediate_size, sizes.hidden_size)
    return dict.fromkeys(select_layers(config.layers, list(source.layers), source.drafts), spec)


def _format(
    source: MoESource, specs: Mapping[int, LayerSpec], copied: Mapping[str, str], config: CompressionConfig
) -> ResMoEFormat:
    reader, sizes = source.reader, source.sizes
    dtypes = source.dtypes(specs)
    if unknown := sorted(set(dtypes) - set(WEIGHT_DTYPES)):
        raise CheckpointError(
            f"{reader.path}: experts are stored as {', '.join(unknown)}, first {dtypes[unknown[0]]!r}; expected "
            f"{' or '.join(WEIGHT_DTYPES)}: convert them, or leave their layers out with --layers"
        )
    drafts = {layer: name for layer, name in (source.names.drafts or {}).items() if layer in specs}
    dtype = widest(dtypes)
    rest = None if config.rest_bits == 16 else _coded_rest(source, copied, dtype)
    return ResMoEFormat(
        format_version=version_for(specs.values(), drafts, rest),
        written_by=f"resmoe {__version__}",
        dtype=dtype,
        num_experts=sizes.num_experts,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        biases=source.architecture.biased,
        names=source.names.model_copy(update={"drafts": drafts or None}),
        layers=dict(sorted(specs.items())),
        rest=rest,
    )


def _coded_rest(source: MoESource, copied: Mapping[str, str], dtype: WeightDtype) -> CodedRest:
    names = rest_matrices(source, copied, dtype)
    if not names:
        raise ConfigError(
            f"--rest-bits 8: {source.reader.path} has no attention, dense layers or embedding in {dtype} under names "
            "that are known; leave it out"
        )
    return CodedRest(bits=8, tensors=names)


def _stored_bytes(source: MoESource, fmt: ResMoEFormat, name: str, copied: str) -> int:
    """Bytes of a copied tensor in the output."""
    return row_bytes(source.reader.shape(copied)) if name in fmt.rest_tensors else source.reader.nbytes(copied)


def _shards(source: MoESource, fmt: ResMoEFormat, copied: Mapping[str, str], selected: list[int]) -> tuple[Shard, ...]:
    groups = group_by_bytes(copied, lambda name: _stored_bytes(source, fmt, name, copied[name]))
    names = iter(shard_names(len(groups) + len(selected)))
    others = [
        Shard(
            next(names),
            None,
            tuple(own for name in group for own in (row_names(name) if name in fmt.rest_tensors else (name,))),
            tuple(copied[name] for name in group),
            tuple(group),
        )
        for group in groups
    ]
    made = [Shard(next(names), layer, tuple(layer_tensors(fmt, layer))) for layer in selected]
    return (*others, *made)


def _peak_memory(fmt: ResMoEFormat, selected: list[int], workers: int) -> int:
    rows, columns = fmt.intermediate_size, len(fmt.names.projections) * fmt.hidden_size
    matrix = rows * columns
    experts = fmt.num_experts * matrix * DTYPES[fmt.dtype].itemsize
    # For each worker, fp32: an expert, its aligned form or its residual and what coding leaves; cost matrices.
    aligning = 4 * matrix + workers * (4 * 2 * matrix + 3 * 4 * rows * rows)
    coding = workers * (4 * 5 * matrix + 4 * 2 * min(rows, columns) ** 2)
    stored = max((layer_bytes(fmt, layer) for layer in selected), default=0)
    return experts + max(aligning, coding + stored)
