"""One MoE layer from weights to stored tensors: read, find the center, code the residuals, measure the error."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from compress_tools.barycenter import find_center
from compress_tools.config import CompressionConfig
from compress_tools.design_matrix import expert_to_rows, rows_to_design
from compress_tools.format.codec import restore_center, restore_expert
from compress_tools.format.tensors import BIAS, DTYPES, dense_layer_bytes, layer_bytes, layer_tensors, tensor_name
from compress_tools.plan import CompressionPlan
from compress_tools.progress import ProgressListener
from compress_tools.report import LayerReport
from compress_tools.residuals.base import StoredTensors
from compress_tools.residuals.registry import encode_center, encode_residual


def compress_layer(
    plan: CompressionPlan,
    config: CompressionConfig,
    layer: int,
    progress: ProgressListener,
) -> tuple[dict[str, Tensor], LayerReport, dict[str, float]]:
    """One MoE layer: tensors by name, its report, seconds by stage."""
    fmt, sizes, projections = plan.fmt, plan.source.sizes, plan.source.projections
    dtype = DTYPES[fmt.dtype]
    spec = fmt.layers[layer]
    clock = _Clock()

    with clock.stage("read"):
        progress.stage(f"layer {layer}: reading", sizes.num_experts)
        design = torch.empty(sizes.num_experts, sizes.intermediate_size, len(projections) * sizes.hidden_size)
        biases: list[dict[Any, Tensor]] = []
        for expert in range(sizes.num_experts):
            weights = plan.source.read_expert(layer, expert)
            design[expert] = rows_to_design(expert_to_rows(weights))
            biases.append(weights.biases or {})
            progress.step()
        design = design.to(config.device)

    with clock.stage("center"):
        progress.stage(f"layer {layer}: center", None)
        # Without a center there is nothing to align to: rows keep their order, which is the plain baseline's.
        kind = config.center if spec.center else "none"
        found = find_center(design, kind, config.max_iterations, config.tolerance, config.workers, progress.step)

    with clock.stage("residual"):
        progress.stage(f"layer {layer}: residuals", sizes.num_experts)
        shared: StoredTensors = {}
        center = None
        if found.center is not None:
            shared = encode_center(spec, found.center, dtype)
            # The residual is taken against the center as stored, so that its rounding is not lost.
            restored_center = restore_center(spec, shared, sizes.hidden_size)
            absent = torch.zeros(sizes.intermediate_size, sizes.hidden_size)
            center = rows_to_design({p: restored_center.get(p, absent) for p in projections}).to(design.device)
        tensors = {tensor_name(fmt, layer, None, *key): tensor for key, tensor in shared.items()}
        errors: list[float] = []
        residual_energy = 0.0
        for expert in range(sizes.num_experts):
            aligned = design[expert][found.perm[expert].to(design.device)]
            residual = aligned - center if center is not None else aligned
            residual_energy += residual.double().square().sum().item()
            own = spec.of_expert(expert)
            stored = encode_residual(own, residual, dtype, config.seed)
            for projection, bias in biases[expert].items():
                # down's bias belongs to the output, whose order does not change.
                ordered = bias if projection == "down_proj" else bias[found.perm[expert]]
                stored[projection, BIAS] = ordered.to(dtype).contiguous()
            for (projection, suffix), tensor in stored.items():
                tensors[tensor_name(fmt, layer, expert, projection, suffix)] = tensor
            restored = rows_to_design(_ordered(restore_expert(own, shared, stored, sizes.hidden_size), projections))
            errors.append((aligned.cpu() - restored).double().square().sum().item())
            progress.step()

    energy = sum(expert.double().square().sum().item() for expert in design)
    report = LayerReport(
        layer=layer,
        approximation_error=sum(errors) / len(errors) / sizes.intermediate_size,
        relative_error=sum(errors) / energy,
        residual_energy=residual_energy / energy if energy else 0.0,
        bytes_before=dense_layer_bytes(fmt),
        bytes_after=layer_bytes(fmt, layer),
        center_start=found.start,
        center_objective=found.objective,
        assignment_gap=found.gap,
    )
    ordered = {name: tensors[name] for name in layer_tensors(fmt, layer)}
    return ordered, report, clock.seconds


def _ordered(rows: dict[Any, Tensor], projections: tuple[Any, ...]) -> dict[Any, Tensor]:
    return {projection: rows[projection] for projection in projections}


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
