"""The comparison's sections: the paper's table, byte budgets, calibration, layer groups, the number of experts."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.rows import Row
from benchmarks.models.reference_models import ReferenceModelConfig
from benchmarks.models.reference_models.corpus import read_corpus
from benchmarks.models.reference_models.model import expert_modules, new_model, upcycle
from benchmarks.quality.gguf_baselines import GGUF, run_gguf
from benchmarks.quality.methods import (
    CENTER_BITS,
    CENTER_TRELLIS,
    PAPER,
    PLAIN_BITS,
    PLANNER,
    PLANNER_BY_OUTPUT,
    TRELLIS_BITS,
    Method,
    Outcome,
    fitted_methods,
    knob_for,
    run_fixed,
    run_merging,
    run_method,
)
from benchmarks.quality.subject import Checkpoint, Subject
from compress_tools.calibration.calibrate import calibrate
from compress_tools.calibration.config import make_calibration_config
from compress_tools.evaluation.predictions import Scores

RETAIN_RATIO = 0.25
# Of the training text: every so many modules, so many tokens of them.
CALIBRATION_STEP, CALIBRATION_TOKENS = 16, 32768
EXPERT_COUNTS = (8, 16, 64)
DROP_FRACTION, EXPERT_NOISE = 0.15, 0.1
Say = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """One method on one model. ``perplexity`` and what follows are None where the error alone was measured."""

    section: str
    model: str
    name: str
    family: str
    options: dict[str, Any]
    bytes_disk: int
    bytes_resident: int
    bytes_original: int
    relative_error: float
    bytes_center: int = 0
    residual_energy: float | None = None
    perplexity: float | None = None
    kl_nats: float | None = None
    kl_p99_nats: float | None = None
    kl_max_nats: float | None = None
    top1_agreement: float | None = None
    asked_ratio: float | None = None

    @property
    def ratio(self) -> float:
        """Bytes on disk as a share of the original experts'."""
        return self.bytes_disk / self.bytes_original

    def row(self, setup: Mapping[str, Any]) -> Row:
        """As JSON holds it: the perplexity where there is one, the error otherwise; the rest as context.

        Args:
            setup: how every model was scored.
        """
        context = {**{key: value for key, value in vars(self).items() if key != "name"}, **setup}
        what, value = ("perplexity", self.perplexity) if self.perplexity else ("relative error", self.relative_error)
        return Row(f"{self.model}: {self.name}: {what}", value, context={"method": self.name, **context})


def original(subject: Subject, label: str) -> Measured:
    """The model as it is."""
    scores, size = subject.score({}), subject.expert_bytes
    return Measured(
        section="original",
        model=label,
        name="original",
        family="original",
        options={},
        bytes_disk=size,
        bytes_resident=size,
        bytes_original=size,
        relative_error=0.0,
        perplexity=scores.perplexity,
        kl_nats=scores.mean_kl,
        kl_p99_nats=scores.kl_percentile(99),
        kl_max_nats=scores.max_kl,
        top1_agreement=scores.top1_agreement,
    )


def paper_section(subject: Subject, label: str, say: Say) -> Iterator[Measured]:
    """The paper's Table 1: 25 % of parameters kept, centers and masks not counted in that; and merging."""
    outcomes = (run_method(subject, method, RETAIN_RATIO) for method in PAPER)
    for outcome in (*outcomes, *run_merging(subject, [])):
        yield _scored("paper", label, subject, outcome, say)


def bytes_section(subject: Subject, label: str, ratios: list[float], say: Say) -> Iterator[Measured]:
    """Every method at every size, all bytes counted."""
    experts = subject.source.sizes.num_experts
    for outcome in run_merging(subject, sorted({int(ratio * experts) for ratio in ratios} - {0})):
        yield _scored("bytes", label, subject, outcome, say)
    for outcome in run_fixed(subject, [*PLAIN_BITS, *CENTER_BITS, *TRELLIS_BITS, *CENTER_TRELLIS]):
        yield _scored("bytes", label, subject, outcome, say)
    for outcome in run_gguf(subject, GGUF, lambda text: say(f"{label}: {text}")):
        yield _scored("bytes", label, subject, outcome, say)
    for method in fitted_methods():
        for ratio in ratios:
            value = knob_for(subject, method, ratio)
            if value is None:
                say(f"{label}: {method.name} does not fit {ratio:.0%}")
                continue
            yield _scored("bytes", label, subject, run_method(subject, method, value), say, ratio)


def calibration_section(subject: Subject, label: str, ratios: list[float], say: Say) -> Iterator[Measured]:
    """Trellis codes and plans that know what errors count, from a text of the training corpus."""
    with tempfile.TemporaryDirectory() as folder:
        text, file = Path(folder) / "text.txt", Path(folder) / "calibration.safetensors"
        text.write_text("\n".join(module.text for module in read_corpus().train[::CALIBRATION_STEP]), encoding="utf-8")
        asked = make_calibration_config(text=str(text), max_tokens=CALIBRATION_TOKENS, coefficients=True)
        calibrate(subject.path, file, asked)
        runs: list[tuple[Method, float | None]] = [(method, None) for method in TRELLIS_BITS]
        runs += [(method, ratio) for method in (PLANNER, PLANNER_BY_OUTPUT) for ratio in ratios]
        for method, ratio in runs:
            named = Method(f"{method.name}, calibrated", method.family, method.options, method.knob)
            outcome = run_method(subject, named, ratio, calibration=file)
            yield _scored("calibration", label, subject, outcome, say, ratio)


def layers_section(subject: Subject, label: str, say: Say) -> Iterator[Measured]:
    """A third of the layers at the bottom, in the middle, at the top, the others left as they are."""
    layers = list(subject.source.layers)
    size = max(1, len(layers) // 3)
    begins = {"bottom": 0, "middle": (len(layers) - size) // 2, "top": len(layers) - size}
    chosen = [
        (method, RETAIN_RATIO)
        for method in PAPER
        if method.name in ("plain pruning (UP)", "ResMoE (UP)", "ResMoE (SVD)")
    ]
    chosen += [(method, None) for method in PLAIN_BITS if method.options["bits"] == 2]
    for where, begin in begins.items():
        indices = ",".join(map(str, layers[begin : begin + size]))
        for method, value in chosen:
            named = Method(f"{method.name}, {where} (layers {indices})", method.family, method.options, method.knob)
            yield _scored("layers", label, subject, run_method(subject, named, value, indices), say)


def experts_section(subject: Subject, label: str, ratio: float, say: Say) -> Iterator[Measured]:
    """What a center costs and gives at 8, 16 and 64 experts; error alone.

    The layer is made, not trained: the mean expert of the model's first layer, copied into every expert, 15 % of each
    copy's channels drawn anew and noise of 0.1 standard deviations added (`reference_models.model.upcycle`).
    """
    for count in EXPERT_COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "source"
            write_upcycled_layer(subject, count, source)
            made, name = Checkpoint(source), f"{label}, {count} experts"
            for method in [
                *(m for m in PLAIN_BITS if m.options["bits"] in (2, 3)),
                *CENTER_BITS[:3],
                *fitted_methods(),
            ]:
                value = knob_for(made, method, ratio) if method.knob else None
                if method.knob and value is None:
                    say(f"{name}: {method.name} does not fit {ratio:.0%}")
                    continue
                outcome = run_method(made, method, value)
                say(f"{name}: {method.name}: error {outcome.relative_error:.4g}")
                yield _measured("experts", name, made, outcome, None, ratio if method.knob else None)


def write_upcycled_layer(subject: Subject, num_experts: int, folder: Path) -> None:
    """Write a checkpoint of one layer, upcycled from the mean expert of the model's first layer."""
    own, sizes = subject.model.config, subject.source.sizes
    config = ReferenceModelConfig(
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_layers=1,
        num_heads=own.num_attention_heads,
        num_kv_heads=own.num_key_value_heads,
        vocab_size=own.vocab_size,
        num_experts=num_experts,
        dense_steps=1,  # asked for by the recipe; nothing is trained here
        drop_fraction=DROP_FRACTION,
        expert_noise=EXPERT_NOISE,
    )
    dense = new_model(config, 1, 1, config.seed)
    with torch.no_grad():
        source, target = expert_modules(subject.model)[0], expert_modules(dense)[0]
        target.gate_up_proj[0] = source.gate_up_proj.mean(dim=0)
        target.down_proj[0] = source.down_proj.mean(dim=0)
    upcycle(dense, config).to(subject.dtype).save_pretrained(folder)


def _scored(
    section: str, label: str, subject: Subject, outcome: Outcome, say: Say, asked_ratio: float | None = None
) -> Measured:
    scores = subject.score(outcome.experts)
    say(f"{label}: {outcome.name}: perplexity {scores.perplexity:.4g}, error {outcome.relative_error:.4g}")
    return _measured(section, label, subject, outcome, scores, asked_ratio)


def _measured(
    section: str, label: str, source: Checkpoint, outcome: Outcome, scores: Scores | None, asked_ratio: float | None
) -> Measured:
    return Measured(
        section=section,
        model=label,
        name=outcome.name,
        family=outcome.family,
        options=outcome.options,
        bytes_disk=outcome.bytes_disk,
        bytes_resident=outcome.bytes_resident,
        bytes_original=source.expert_bytes,
        relative_error=outcome.relative_error,
        bytes_center=outcome.bytes_center,
        residual_energy=outcome.residual_energy,
        perplexity=scores.perplexity if scores else None,
        kl_nats=scores.mean_kl if scores else None,
        kl_p99_nats=scores.kl_percentile(99) if scores else None,
        kl_max_nats=scores.max_kl if scores else None,
        top1_agreement=scores.top1_agreement if scores else None,
        asked_ratio=asked_ratio,
    )
