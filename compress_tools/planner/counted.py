"""What a layer's measured errors count in the total, where `resmoe calibrate` said what errors of its weights do."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress_tools.format.schema import Projection
from compress_tools.importance import CalibrationFile, LayerImportance, is_calibration, opened_calibration
from compress_tools.numerics.parallel import in_parallel
from compress_tools.numerics.products import squared_norm
from compress_tools.planner.config import PlannerConfig
from compress_tools.source.design_matrix import design_to_rows
from compress_tools.source.moe_source import MoESource


@dataclass(frozen=True)
class Calibration:
    """A calibration of the layers that are planned.

    Attributes:
        file: it.
        source: the checkpoint.
        coefficients: by layer the KL for each unit of relative error; empty where not measured, or not asked for.
    """

    file: CalibrationFile
    source: MoESource
    coefficients: dict[int, float]

    def layer(self, layer: int) -> LayerImportance | None:
        """What errors of a layer's weights count; None of one for multi-token prediction, which was not run."""
        if self.file.lacks(layer, self.source.drafts):
            return None
        return self.file.layer(layer, self.source.projections, self.source.sizes)

    def factor(self, layer: int) -> float:
        """What a layer's relative error counts: its coefficient; the mean one of a layer that was not run."""
        if not self.coefficients:
            return 1.0
        return self.coefficients.get(layer, sum(self.coefficients.values()) / len(self.coefficients))


def open_calibration(request: PlannerConfig, source: MoESource, layers: Iterable[int]) -> Calibration | None:
    """The request's calibration; None without one, or where it is a file of layers' inputs.

    Raises:
        CheckpointError: not readable, or of another source.
    """
    if request.calibration is None or not is_calibration(request.calibration):
        return None
    file = opened_calibration(request.calibration, source.reader.fingerprint())
    found = Calibration(file, source, {})
    if request.optimize != "output":
        return found
    read = {layer: found.layer(layer) for layer in layers}
    run = {layer: own.coefficient for layer, own in read.items() if own is not None}
    coefficients = {layer: value for layer, value in run.items() if value is not None}
    # All of the layers that the model runs, or none: KL and relative errors don't add up.
    return Calibration(file, source, coefficients if len(coefficients) == len(run) else {})


def counted_by_output(
    design: Tensor,
    projections: tuple[Projection, ...],
    importance: LayerImportance,
    coefficient: float | None,
    workers: int = 1,
) -> float:
    """What a unit of weighed squared error counts under ``--optimize output``.

    Without a coefficient relative to the layer's output. With one, KL: the coefficient was measured by noise of a known
    size relative to each matrix, and this is how many times that noise's effect an error has, to first order.

    Args:
        design: design matrices ``[E, I, P*H]``, rows in the source's order.
        projections: P.
        importance: of the layer.
        coefficient: KL for each unit of relative error.
        workers: experts side by side.
    """
    if coefficient is None:
        return 1 / importance.energy

    def of_noise(expert: int) -> float:
        own, total = importance.expert(expert), 0.0
        for projection, rows in design_to_rows(design[expert].float(), projections).items():
            columns = own.columns.get(projection, torch.ones(()))
            total += float(own.rows[projection].mean() * columns.mean()) * squared_norm(rows)
        return total

    return coefficient / sum(in_parallel(of_noise, range(len(design)), workers))
