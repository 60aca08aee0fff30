"""One MoE layer from weights to stored tensors: find the center, code the residuals, measure the error."""

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from compress_tools.center.barycenter import CenterOptions, CenterResult, find_center
from compress_tools.config import CompressionConfig
from compress_tools.errors import NumericalError
from compress_tools.format.codec import decode_residual, restore_center
from compress_tools.format.dtypes import DTYPES
from compress_tools.format.parts.base import StoredTensors
from compress_tools.format.tensors import BIAS, layer_bytes, layer_tensors, tensor_name
from compress_tools.importance import LayerImportance
from compress_tools.numerics.parallel import in_parallel
from compress_tools.numerics.products import squared_distance, squared_norm
from compress_tools.numerics.work import Work
from compress_tools.output.target import CompressionTarget
from compress_tools.report import LayerReport
from compress_tools.residuals.registry import encode_center, encode_residual
from compress_tools.source.design_matrix import design_to_rows, rows_to_design
from compress_tools.source.layer_weights import LayerWeights


@dataclass(frozen=True)
class CodedLayer:
    """One MoE layer's stored tensors.

    Attributes:
        shared: the center's tensors by (projection, suffix).
        experts: each expert's tensors by (projection, suffix).
        errors: for each expert ``||aligned - restored||_F^2``.
        residual_energies: for each expert ``||aligned - center||_F^2``, the center as stored.
    """

    shared: StoredTensors
    experts: list[StoredTensors]
    errors: list[float]
    residual_energies: list[float]


@dataclass(frozen=True)
class CompressedLayer:
    """One MoE layer as it is written.

    Attributes:
        tensors: by name, in the order of the file.
        report: what it lost and takes.
    """

    tensors: dict[str, Tensor]
    report: LayerReport


def compress_layer(
    target: CompressionTarget,
    config: CompressionConfig,
    layer: int,
    weights: LayerWeights,
    work: Work,
    importance: LayerImportance | None = None,
) -> CompressedLayer:
    """Compress one MoE layer that has been read.

    Args:
        target: says how it is stored.
        config: says how its center is found; and the seed.
        layer: decoder layer index.
        weights: its experts.
        work: how it is done and watched.
        importance: what errors count while its rows are coded; None where all count alike.
    """
    fmt = target.fmt
    work.progress.stage("center", None, layer)
    # Without a center there is nothing to align to: rows keep their order, which is the plain baseline's.
    kind = config.center if fmt.layers[layer].center else "none"
    found = find_center(weights.design, CenterOptions(kind, config.max_iterations, config.tolerance), work)
    coded = code_layer(target, layer, weights, found, config.seed, work, importance)
    energy = sum(in_parallel(squared_norm, weights.design, work.workers))
    error = sum(coded.errors)
    if not isfinite(error) or not isfinite(energy):
        raise NumericalError(
            f"layer {layer}: its error is no finite number: experts' weights reach {_largest(weights):.3g}, too large "
            "to be compressed; expected weights of a trained model"
        )
    report = LayerReport(
        layer=layer,
        approximation_error=error / len(coded.errors) / fmt.intermediate_size,
        relative_error=error / energy if energy else 0.0,
        residual_energy=sum(coded.residual_energies) / energy if energy else 0.0,
        bytes_before=sum(map(target.source.reader.nbytes, target.source.expected(layer))),
        bytes_after=layer_bytes(fmt, layer),
        center_start=found.start,
        center_objective=found.objective,
        assignment_gap=found.gap,
    )
    named = {tensor_name(fmt, layer, None, *key): tensor for key, tensor in coded.shared.items()}
    for expert, stored in enumerate(coded.experts):
        named.update({tensor_name(fmt, layer, expert, *key): tensor for key, tensor in stored.items()})
    return CompressedLayer({name: named[name] for name in layer_tensors(fmt, layer)}, report)


def _largest(weights: LayerWeights) -> float:
    return max(float(expert.abs().max()) for expert in weights.design)


def code_layer(
    target: CompressionTarget,
    layer: int,
    weights: LayerWeights,
    found: CenterResult,
    seed: int,
    work: Work,
    importance: LayerImportance | None = None,
) -> CodedLayer:
    """Code one layer by its spec, experts side by side, and measure each expert's error on what is stored."""
    spec = target.fmt.layers[layer]
    sizes, projections, dtype = target.source.sizes, target.source.projections, DTYPES[target.fmt.dtype]
    shared: StoredTensors = {}
    center = None
    if found.center is not None:
        shared = encode_center(spec, found.center, dtype, importance=None if importance is None else importance.center)
        # The residual is taken against the center as stored, so that its rounding is not lost.
        absent = torch.zeros(sizes.intermediate_size, sizes.hidden_size)
        rows = {**dict.fromkeys(projections, absent), **restore_center(spec, shared, sizes.hidden_size)}
        center = rows_to_design({projection: rows[projection] for projection in projections})
        del rows
    stored_center = {} if center is None else design_to_rows(center, projections)
    if center is not None:
        center = center.to(weights.design.device)

    def code(expert: int) -> tuple[StoredTensors, float, float]:
        perm = found.perm[expert]
        aligned = weights.design[expert][perm.to(weights.design.device)]
        residual = aligned.float() if center is None else aligned - center
        own = spec.of_expert(expert)
        counts = None if importance is None else importance.expert(expert).permuted(perm)
        stored = encode_residual(own, residual, dtype, seed, counts)
        energy = squared_norm(residual)
        del residual
        for projection, bias in weights.biases[expert].items():
            # down's bias belongs to the output, whose order does not change.
            ordered = bias if projection == "down_proj" else bias[perm]
            stored[projection, BIAS] = ordered.to(dtype).contiguous()
        # As ``restore_expert`` does, but in place: a large expert is not copied three times.
        restored = decode_residual(own, stored, sizes.hidden_size)
        for projection, center_rows in stored_center.items():
            restored[projection] += center_rows
        rows = design_to_rows(aligned.cpu(), projections)
        error = sum(squared_distance(rows[projection], restored[projection]) for projection in projections)
        work.progress.step()
        return stored, error, energy

    with work.clock.stage("residual"):
        work.progress.stage("residuals", sizes.num_experts, layer)
        coded = in_parallel(code, range(sizes.num_experts), work.workers)
    return CodedLayer(
        shared,
        [stored for stored, _, _ in coded],
        [error for _, error, _ in coded],
        [energy for _, _, energy in coded],
    )
