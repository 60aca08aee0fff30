"""The rows of the comparison that are held against a target."""

from benchmarks.harness.rows import Row
from benchmarks.quality.compare import Measured
from benchmarks.quality.methods import PLANNER, PLANNER_BY_OUTPUT

ENERGY_TARGET = 0.2
# The paper's order in error, at its own accounting: the first at most the second.
ORDER = (
    ("ResMoE (UP)", "plain pruning (UP)"),
    ("ResMoE (SVD)", "plain SVD"),
    ("ResMoE (UP)", "merging, barycenter"),
    ("ResMoE (SVD)", "merging, barycenter"),
    ("merging, barycenter", "merging, Git Re-Basin average"),
    ("merging, Git Re-Basin average", "merging, plain average"),
    ("ResMoE (UP)", "Git Re-Basin center + UP"),
    ("Git Re-Basin center + UP", "mean center + UP"),
)
# Bits -> KL of trellis codes as a share of plain codes'.
TRELLIS_KL = {4: 0.70, 3: 0.70, 2: 0.78}
# KL of the planner's plans as a share of that of the best plain method that fits, at these sizes.
PLANNED_KL, PLANNED_RATIOS = 0.65, (0.25, 0.2, 0.15)
PLAIN_4_RATIO = 0.25
# Experts fine-tuned from one dense model: added perplexity at one size, and a size at which plain 3-bit's is reached.
MERGED, MERGED_RATIO, MERGED_PERPLEXITY, MERGED_SMALL = "merged", 0.2, 1.005, 0.1


def verdicts(label: str, energy_share: float, found: list[Measured]) -> list[Row]:
    """Every figure with a target that these measurements hold.

    Args:
        label: the model's.
        energy_share: of its residuals, unaligned.
        found: what was measured on it.
    """
    rows = []
    if label != MERGED:
        name = f"{label}: residual energy share, unaligned"
        rows.append(Row.at_least(name, energy_share, "", ENERGY_TARGET, model=label))
    rows += _papers_order(label, [one for one in found if one.section == "paper"])
    sized = [one for one in found if one.section == "bytes"]
    by_name = {one.name: one for one in sized if one.asked_ratio is None}
    rows += _against_plain_4_bit(label, sized, by_name)
    rows += _trellis_against_codes(label, by_name)
    rows += _planner_against_plain(label, sized)
    if label == MERGED:
        rows += _of_merged(label, sized, by_name, [one for one in found if one.section == "original"])
    return rows


def _papers_order(label: str, found: list[Measured]) -> list[Row]:
    error = {one.name: one.relative_error for one in found}
    return [
        _at_most(label, f"error of {lower}, at most that of {higher}", error[lower], error[higher])
        for lower, higher in ORDER
        if lower in error and higher in error
    ]


def _against_plain_4_bit(label: str, sized: list[Measured], by_name: dict[str, Measured]) -> list[Row]:
    rows = []
    plain = by_name.get("plain 4-bit")
    for planner in (PLANNER, PLANNER_BY_OUTPUT):
        planned = _planned(sized, PLAIN_4_RATIO, planner.name)
        if planned and plain:
            sizes = f"{planned.ratio:.1%}, at most plain 4-bit's at {plain.ratio:.1%}"
            rows.append(
                _at_most(label, f"perplexity of {planner.name} at {sizes}", planned.perplexity, plain.perplexity)
            )
    return rows


def _trellis_against_codes(label: str, by_name: dict[str, Measured]) -> list[Row]:
    rows = []
    for bits, share in TRELLIS_KL.items():
        trellis, plain = by_name.get(f"trellis {bits}-bit"), by_name.get(f"plain {bits}-bit")
        if trellis and plain:
            sizes = f"{trellis.ratio:.1%}, of plain {bits}-bit's at {plain.ratio:.1%}"
            rows.append(_at_most(label, f"KL of {trellis.name} at {sizes}", trellis.kl_nats / plain.kl_nats, share))
            name = f"perplexity of {trellis.name} at {sizes}"
            rows.append(_at_most(label, name, trellis.perplexity, plain.perplexity))
    return rows


def _planner_against_plain(label: str, sized: list[Measured]) -> list[Row]:
    rows = []
    for ratio in PLANNED_RATIOS:
        planned = _planned(sized, ratio, PLANNER.name)
        fitting = [one for one in sized if one.family == "plain" and one.ratio <= ratio]
        if planned and fitting:
            best = min(fitting, key=lambda one: one.kl_nats)
            name = f"KL of {PLANNER.name} at {planned.ratio:.1%}, of {best.name}'s at {best.ratio:.1%}"
            rows.append(_at_most(label, name, planned.kl_nats / best.kl_nats, PLANNED_KL))
    return rows


def _of_merged(label: str, sized: list[Measured], by_name: dict[str, Measured], originals: list[Measured]) -> list[Row]:
    rows = []
    planned = _planned(sized, MERGED_RATIO, PLANNER.name)
    if planned and originals:
        target = MERGED_PERPLEXITY * originals[0].perplexity
        name = f"perplexity of {PLANNER.name} at {planned.ratio:.1%}, at most {MERGED_PERPLEXITY} times the original's"
        rows.append(_at_most(label, name, planned.perplexity, target))
    small, plain = _planned(sized, MERGED_SMALL, PLANNER.name), by_name.get("plain 3-bit")
    if small and plain:
        name = f"perplexity of {PLANNER.name} at {small.ratio:.1%}, at most plain 3-bit's at {plain.ratio:.1%}"
        rows.append(_at_most(label, name, small.perplexity, plain.perplexity))
    return rows


def _planned(sized: list[Measured], ratio: float, name: str) -> Measured | None:
    return next((one for one in sized if one.name == name and one.asked_ratio == ratio), None)


def _at_most(label: str, name: str, value: float, target: float) -> Row:
    return Row.at_most(f"{label}: {name}", value, "", target, model=label)
