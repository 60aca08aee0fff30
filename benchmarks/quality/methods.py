"""The methods that are compared, and how each is brought to a byte budget."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quality.merging import Merged, RouterUse, merge_all, merge_groups
from benchmarks.quality.subject import Checkpoint, Experts, Subject
from compress_tools.config import make_config
from compress_tools.errors import ConfigError
from compress_tools.numerics.products import squared_norm
from compress_tools.output.target import make_target
from compress_tools.pipeline import compress
from compress_tools.planner.budget import plan_for_budget
from compress_tools.planner.config import make_planner_config
from compress_tools.source.design_matrix import design_to_rows, rows_to_expert
from compress_tools.stored.checkpoint import ResMoECheckpoint
from compress_tools.stored.inspection import inspect

BISECTIONS = 14


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Attributes:
        name: as tables show it.
        family: what it is drawn with: plain, merging or ResMoE.
        options: of `resmoe compress`.
        knob: the option that sets its size; empty where ``options`` fix it.
    """

    name: str
    family: str
    options: dict[str, Any]
    knob: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a method made of a model's experts.

    Attributes:
        name, family: the method's.
        options: of `resmoe compress`; of merging the number of experts left.
        bytes_disk: bytes of all experts: centers, masks, scales, codes, and layers left as they are.
        bytes_resident: the same once vLLM holds them.
        bytes_center: of ``bytes_disk``, the centers'.
        relative_error: ``sum_k ||T_k W_k - restored_k||^2 / sum_k ||W_k||^2``, mean over the layers compressed.
        residual_energy: the same with nothing stored but the center, after alignment; None where there is none.
        experts: restored, fp32.
    """

    name: str
    family: str
    options: dict[str, Any]
    bytes_disk: int
    bytes_resident: int
    bytes_center: int
    relative_error: float
    residual_energy: float | None
    experts: Experts = field(repr=False)


# `--target-bytes-ratio`; options are the planner's.
PLANNER = Method("ResMoE planner", "ResMoE", {}, "target_bytes_ratio")
PLANNER_BY_OUTPUT = Method("ResMoE planner, by output", "ResMoE", {"optimize": "output"}, PLANNER.knob)


def _method(name: str, family: str, **options: Any) -> Method:
    return Method(name, family, options, "retain_ratio")


# The paper's Table 1: the same share of parameters kept, centers not counted.
PAPER = [
    _method("plain pruning (UP)", "plain", method="prune", center="none"),
    _method("plain SVD", "plain", method="low-rank", center="none"),
    _method("mean center + UP", "ResMoE", method="prune", center="mean"),
    _method("Git Re-Basin center + UP", "ResMoE", method="prune", center="git-rebasin"),
    _method("ResMoE (UP)", "ResMoE", method="prune"),
    _method("ResMoE (SVD)", "ResMoE", method="low-rank"),
]
# Sized to the byte.
FITTED = [
    *PAPER,
    _method("plain pruning, 4-bit values", "plain", method="prune", center="none", value_bits=4),
    _method("ResMoE (UP), 4-bit center and values", "ResMoE", method="prune", value_bits=4, center_bits=4),
    _method(
        "ResMoE, 4-bit center, 2 bits + low rank",
        "ResMoE",
        method="low-rank+quantize",
        bits=2,
        center_bits=4,
        factor_bits=8,
    ),
]
# Sizes that the number of bits fixes.
PLAIN_BITS = [
    Method(f"plain {bits}-bit", "plain", {"method": "quantize", "bits": bits, "center": "none"})
    for bits in (2, 3, 4, 8)
]
CENTER_BITS = [
    Method(
        f"ResMoE, {center}-bit center, {bits}-bit residual", "ResMoE",
        {"method": "quantize", "bits": bits, "center_bits": center},
    )
    for center, bits in ((4, 2), (8, 2), (4, 3), (8, 3), (4, 4), (8, 4))
]  # fmt: skip


# Trellis codes alone, a scale for each row: against plain codes of the same bits, at a few bytes less.
TRELLIS_BITS = [
    Method(f"trellis {bits}-bit", "ResMoE", {"method": "trellis", "bits": bits, "center": "none"}) for bits in (2, 3, 4)
]
CENTER_TRELLIS = [
    Method(
        f"ResMoE, {center}-bit center, {bits}-bit trellis",
        "ResMoE",
        {"method": "trellis", "bits": bits, "center_bits": center, "center_coder": coder},
    )
    for center, coder, bits in ((4, "trellis", 1), (4, "trellis", 2), (4, "trellis", 3), (8, "codes", 4))
]


def fitted_methods() -> list[Method]:
    """Every method that can be brought to a size."""
    return [*FITTED, PLANNER, PLANNER_BY_OUTPUT]


def run_method(
    subject: Checkpoint,
    method: Method,
    value: float | None = None,
    layers: str = "all",
    calibration: Path | None = None,
) -> Outcome:
    """Compress as `resmoe compress` does, read back what was written.

    Args:
        subject: the model.
        method: what to do.
        value: its knob's.
        layers: as `--layers`; not with the planner, which chooses.
        calibration: as `--calibration`.
    """
    seen = {} if calibration is None else {"calibration": str(calibration)}
    options = {**method.options, **({method.knob: value} if method.knob else {})}
    if layers != "all":
        options["layers"] = layers
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "compressed"
        if method.knob == PLANNER.knob:
            planned = plan_for_budget(subject.path, make_config(**seen), make_planner_config(**options, **seen))
            report = compress(subject.path, target, make_config(**seen), planned=planned)
        else:
            report = compress(subject.path, target, make_config(**options, **seen))
        checkpoint, found = ResMoECheckpoint(target), inspect(target)
        experts = {
            layer: [
                rows_to_expert(checkpoint.expert(layer, expert)) for expert in range(subject.source.sizes.num_experts)
            ]
            for layer in checkpoint.fmt.layers
        }
        center = sum(tensor.nbytes for layer in experts for tensor in checkpoint.shared(layer).values())
        resident = report.expert_bytes_after + sum(one.bytes_resident - one.bytes_disk for one in found.layers)
    energies = [one.residual_energy for one in report.layers]
    return Outcome(
        method.name,
        method.family,
        options,
        report.expert_bytes_after,
        resident,
        center,
        report.relative_error,
        None if options.get("center") == "none" else sum(energies) / len(energies),
        experts,
    )


def knob_for(subject: Checkpoint, method: Method, bytes_ratio: float) -> float | None:
    """The knob's value that makes a method as large as a share of the experts' bytes allows; None if nothing does."""
    if method.knob == PLANNER.knob:
        return bytes_ratio
    budget = bytes_ratio * subject.expert_bytes

    def size(value: float) -> int | None:
        try:
            config = make_config(**method.options, retain_ratio=value)
            return make_target(subject.source.reader, config).expert_bytes_after
        except ConfigError:  # so little that nothing is kept
            return None

    least, most = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (least + most) / 2
        found = size(middle)
        least, most = (middle, most) if found is None or found <= budget else (least, middle)
    found = size(least) if least else None
    return least if found is not None and found <= budget else None


def run_fixed(subject: Subject, methods: list[Method]) -> Iterator[Outcome]:
    """Methods whose size is what it is."""
    for method in methods:
        yield run_method(subject, method)


def run_merging(subject: Subject, num_experts: list[int]) -> Iterator[Outcome]:
    """Averages of all experts, plain and aligned; then M-SMoE at each number of experts left."""
    designs = {layer: subject.design(layer) for layer in subject.source.layers}
    for name, kind in {
        "merging, plain average": "mean",
        "merging, Git Re-Basin average": "git-rebasin",
        "merging, barycenter": "barycenter",
    }.items():
        yield _merged(subject, name, {layer: merge_all(design, kind) for layer, design in designs.items()}, designs)
    use: dict[int, RouterUse] = subject.router_use()
    for count in num_experts:
        merged = {layer: merge_groups(design, use[layer], count) for layer, design in designs.items()}
        yield _merged(subject, "merging, M-SMoE", merged, designs)


def _merged(subject: Subject, name: str, merged: dict[int, Merged], designs: dict[int, Any]) -> Outcome:
    total, experts, errors = 0, {}, []
    for layer, one in merged.items():
        dtype = subject.dtype
        kept = [rows_to_expert(design_to_rows(center.to(dtype), subject.source.projections)) for center in one.centers]
        experts[layer] = [kept[number] for number in one.group.tolist()]
        errors.append(one.squared_error / sum(map(squared_norm, designs[layer])))
        # A byte for each expert says which one stands for it.
        total += subject.expert_bytes // len(designs) * len(kept) // len(one.group) + len(one.group)
    left = {"experts_left": len(next(iter(merged.values())).centers)}
    return Outcome(name, "merging", left, total, total, 0, sum(errors) / len(errors), None, experts)
