"""One mutant through every loader: refused in a sentence, or served as its restored checkpoint is."""

import os
import re
import resource
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import compress_tools
from compress_tools.errors import ResMoEError
from compress_tools.format.tensors import is_resmoe_name
from tests.fuzz import loaders
from tests.fuzz.mutants import CANARY_VARIABLE, Mutant
from tests.fuzz.seeds import write_files

# Bytes beyond those that were resident before: checkpoints are of less than 1 MiB.
MEMORY_LIMIT = 64 * 2**20
# Of vLLM, whose first model of a process imports the half of it.
VLLM_MEMORY_LIMIT = 768 * 2**20
# Of the seed with a draft: transformers has no place for it, so that it never reads what restore refuses.
DRAFT_LAYER = "model.layers.2."
# What `verify` says where a plain tensor is missing, or has another name: vLLM has words of its own for it.
INCOMPLETE = "incomplete: there is no"
# What transformers says where numbers that its class makes of config.json, such as a rotation's frequencies, are none.
COMPUTED = "computed from it"
# What is said where center and residual are finite and their sum is not.
BEYOND = "the restored weights are beyond"
# What vLLM says of a name that its class of the family has no place for, which nobody else knows.
NO_PLACE = "There is no module or parameter named"
# Of logits, relative to the largest: what sums of two orders can differ by.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}
# Of a layer's answers, relative to the sum of all magnitudes that go into one. Good checkpoints reach 2e-9, 2e-4 and
# 5e-6; an answer without its experts would be wrong by 1e-2.
LAYER_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 5e-5}
# The same of transformers' layers, whose products are torch's, rounded to the model's dtype one after the other.
TORCH_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 2e-4}
# Packages whose code must not raise anything but its own errors, whoever calls it.
OURS = ("compress_tools", "resmoe_vllm")
TOP = Path(compress_tools.__file__).parents[1]
# What a refusal is about: something of the checkpoint by its name.
PLACES = re.compile(
    r"config|layer|tensor|expert|index|shard|safetensors|report|model_type|\.json|resmoe_|weight|bytes more"
)


@dataclass
class Trial:
    """What became of a mutant.

    Attributes:
        mutant: what it is.
        outcomes: by loader one word: refused, theirs (refused by transformers' or vLLM's own checks), served,
            overflows (finite weights whose sums are not, here as in the restored checkpoint).
        faults: what should not have been, in sentences.
        sentences: refusals, by loader.
    """

    mutant: Mutant
    outcomes: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    sentences: dict[str, str] = field(default_factory=dict)

    def call(self, loader: str, act: Callable[[], Any], *, theirs: bool) -> Any:
        """The loader's answer; None where it refuses.

        Args:
            loader: its name.
            act: calls it.
            theirs: errors that transformers, vLLM or safetensors raise are refusals, too.
        """
        forget_peak()
        before = resident_bytes()
        answer = None
        try:
            answer = act()
            self.outcomes[loader] = "served"
        except ResMoEError as err:
            self._refused(loader, err)
        except Exception as err:
            # vLLM and pydantic wrap what a config class raises.
            if (own := _own_cause(err)) is not None:
                self._refused(loader, own)
            elif self._may_be_theirs(loader, err, theirs=theirs):
                self.outcomes[loader] = "theirs"
                self.sentences[loader] = f"{type(err).__name__}: {str(err)[:200]}"
            else:
                self.outcomes[loader] = "fault"
                self.faults.append(f"{loader}: {type(err).__name__}: {str(err)[:300]}; {_where(err)}")
        taken = peak_bytes() - before
        # What transformers takes for a dense model is not this project's to bound.
        if loader != "twin" and taken > (VLLM_MEMORY_LIMIT if loader == "vllm" else MEMORY_LIMIT):
            self.faults.append(f"{loader}: took {taken >> 20} MiB")
        return answer

    def _refused(self, loader: str, err: ResMoEError) -> None:
        self.outcomes[loader], sentence = "refused", str(err)
        self.sentences[loader] = sentence
        if "\n" in sentence or len(sentence) < 20 or len(sentence) > 2000 or re.search(r"Errno|Traceback", sentence):
            self.faults.append(f"{loader}: not a sentence: {sentence[:300]!r}")
        if not PLACES.search(sentence):
            self.faults.append(f"{loader}: does not say where: {sentence[:300]!r}")

    def _may_be_theirs(self, loader: str, err: Exception, *, theirs: bool) -> bool:
        """Whether an error is in place though it is none of ours.

        It is where a library is asked before this project is, or reads what any model has. Where code of this project
        is on the way to it, it would have had to refuse first.
        """
        if isinstance(err, MemoryError) or "can't allocate memory" in str(err) or _own_frame(err):
            return False
        # transformers turns every `dtype` of config.json into text, the block's too, before it asks what a block is.
        dtype = loader in ("transformers", "vllm") and any("dtype" in what for what in self.mutant.changes)
        return theirs or (dtype and re.search(r"configuration_utils\.py:\d+$", _where(err)) is not None)


def try_mutant(mutant: Mutant, *, whole: bool = False) -> Trial:
    """Put a mutant on the disk and through every loader.

    Args:
        mutant: the changed checkpoint.
        whole: through vLLM's own loader of models, too, which takes seconds.
    """
    trial = Trial(mutant)
    with tempfile.TemporaryDirectory(prefix="resmoe-fuzz-") as name:
        top = Path(name)
        os.environ[CANARY_VARIABLE] = str(top / "canary")
        folder = write_files(mutant.files, top / "mutant")
        _judge(trial, folder, top / "dense", whole=whole)
        if (top / "canary").exists():
            trial.faults.append("code of the checkpoint was run")
    return trial


def try_served(mutant: Mutant) -> Trial:
    """The quick half of ``try_mutant``: by ``verify`` and the plugin alone."""
    trial = Trial(mutant)
    with tempfile.TemporaryDirectory(prefix="resmoe-fuzz-") as name:
        folder = write_files(mutant.files, Path(name) / "mutant")
        trial.call("verify", lambda: loaders.by_verify(folder), theirs=False)
        try:
            loaders.expect_block(folder)
        except ResMoEError:
            return trial
        answers = trial.call("plugin", lambda: loaders.by_plugin(folder), theirs=False)
        if answers is not None:
            truth = trial.call("truth", lambda: loaders.layer_truth(folder), theirs=False)
            _compare_layers(trial, "plugin", answers, truth, LAYER_TOLERANCE)
        if trial.outcomes["plugin"] == "refused" and trial.outcomes["verify"] != "refused":
            trial.faults.append(f"verify: takes what the plugin refuses: {trial.sentences['plugin']}")
    return trial


def _judge(trial: Trial, folder: Path, dense: Path, *, whole: bool) -> None:
    trial.call("verify", lambda: loaders.by_verify(folder), theirs=False)
    try:
        loaders.expect_block(folder)
    except ResMoEError:
        # Not a ResMoE checkpoint to vLLM and transformers, which never ask this project.
        trial.outcomes["transformers"] = trial.outcomes["plugin"] = "theirs"
        if trial.outcomes["verify"] != "refused":
            trial.faults.append("verify: takes what is no ResMoE checkpoint")
        return
    ours = trial.mutant.ours
    without_weights = not any(name.endswith(".safetensors") for name in trial.mutant.files)
    theirs = not ours or without_weights
    found = trial.call("transformers", lambda: loaders.by_transformers(folder), theirs=theirs)
    answers = trial.call("plugin", lambda: loaders.by_plugin(folder), theirs=False)
    trial.call("restore", lambda: loaders.by_restore(folder, dense), theirs=False)
    if found is not None:
        expected = None
        if trial.outcomes["restore"] == "served":
            expected = trial.call("twin", lambda: loaders.by_twin(dense), theirs=theirs)
        _compare(trial, found, expected, dense)
    # Layers' answers are those of the activation that the seed's config.json says.
    layers = found.layers if found is not None and "edit_config" not in trial.mutant.kinds else {}
    if answers is not None or layers:
        truth = trial.call("truth", lambda: loaders.layer_truth(folder), theirs=False)
        _compare_layers(trial, "plugin", answers or {}, truth, LAYER_TOLERANCE)
        _compare_layers(trial, "transformers", layers, truth, TORCH_TOLERANCE)
    if whole:
        served = trial.call("vllm", lambda: loaders.by_vllm(folder), theirs=theirs)
        if served is not None:
            _judge_vllm(trial, served.model)
    for loader in ("transformers", "plugin", "vllm", "restore"):
        # Whoever checks a checkpoint beforehand must hear of what will be refused, but for what a model class computes.
        sentence = trial.sentences.get(loader, "")
        known = COMPUTED not in sentence and BEYOND not in sentence and not _has_no_place(trial, loader)
        if known and trial.outcomes.get(loader) == "refused" and trial.outcomes["verify"] != "refused":
            trial.faults.append(f"verify: takes what {loader} refuses: {trial.sentences[loader]}")


def _has_no_place(trial: Trial, loader: str) -> bool:
    """Whether vLLM alone could know that a name is none of the model's: a plain one that the mutant made."""
    sentence = trial.sentences.get(loader, "")
    name = re.search(r": '([^']+)' \(", sentence)
    made = {"add", "rename"}.intersection(trial.mutant.kinds)
    return loader == "vllm" and NO_PLACE in sentence and bool(made and name and not is_resmoe_name(name[1]))


def _judge_vllm(trial: Trial, model: torch.nn.Module) -> None:
    # A draft's layer is loaded with the draft.
    if trial.outcomes["plugin"] == "refused" and DRAFT_LAYER not in trial.sentences["plugin"]:
        trial.faults.append(f"vllm: loads what the plugin's parts refuse: {trial.sentences['plugin']}")
    if INCOMPLETE in trial.sentences.get("verify", "") and DRAFT_LAYER not in trial.sentences["verify"]:
        trial.faults.append(f"vllm: serves what is {trial.sentences['verify']}")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            trial.faults.append(f"vllm: {name} is not finite")


def _compare(trial: Trial, found: loaders.Logits, expected: loaders.Logits | None, dense: Path) -> None:
    """What transformers serves beside the dense twin: the same numbers, or none where the twin's are none."""
    if expected is None:
        _judge_without_twin(trial)
        return
    if expected.made_up or found.made_up:
        if trial.outcomes["verify"] != "refused":
            trial.faults.append(f"verify: takes what has no {min(expected.made_up | found.made_up)}")
        return
    if not expected.values.isfinite().all():
        trial.outcomes["transformers"] = "overflows"
        # Squares, and products of two of them, are what overflows first.
        limit = torch.finfo(expected.values.dtype).max ** 0.5 / 8
        if "edit_config" not in trial.mutant.kinds and loaders.largest_inside(dense) < limit:
            trial.faults.append("twin: logits are not finite, and nothing in the model is large")
        return
    if not found.values.isfinite().all():
        trial.faults.append("transformers: not finite, the restored checkpoint's logits are")
        return
    scale = max(1.0, float(expected.values.abs().max()))
    worst = float((found.values.float() - expected.values.float()).abs().max()) / scale
    if not worst <= TOLERANCE[found.values.dtype] and not _as_near_as_the_twin(found.values, expected.values, dense):
        trial.faults.append(f"transformers: logits differ from the restored checkpoint's by {worst:.3g}")


def _as_near_as_the_twin(found: torch.Tensor, expected: torch.Tensor, dense: Path) -> bool:
    """Each token at most twice as far as the twin from what fp64 makes, whose own rounding may be more."""
    exact = loaders.exact_logits(dense)
    own, theirs = ((logits.double() - exact).abs().amax(-1) for logits in (found, expected))
    floor = TOLERANCE[found.dtype] * exact.abs().amax(-1).clamp(min=1)
    return bool((own <= torch.maximum(2 * theirs, floor)).all())


def _judge_without_twin(trial: Trial) -> None:
    refusal = trial.sentences.get("restore", "")
    if trial.outcomes["restore"] == "served":
        # By transformers' own words, which are let pass for what any model has alone.
        if trial.outcomes["twin"] != "theirs" or trial.outcomes["verify"] != "refused":
            trial.faults.append("twin: is not loaded")
    elif BEYOND in refusal:
        # Center and residual are both finite. Their sum is what an answer with Inf would come from.
        trial.outcomes["transformers"] = "overflows"
    elif DRAFT_LAYER not in refusal:
        trial.faults.append(f"transformers: serves what restore refuses: {refusal}")


def _compare_layers(
    trial: Trial,
    loader: str,
    answers: dict[int, torch.Tensor],
    truth: dict[int, loaders.LayerTruth] | None,
    tolerance: dict[torch.dtype, float],
) -> None:
    if truth is None:
        if answers:
            trial.faults.append(f"{loader}: serves what the format's reader refuses: {trial.sentences.get('truth')}")
        return
    for index, answer in answers.items():
        largest = torch.finfo(torch.float16 if answer.dtype == torch.float16 else torch.float32).max
        # A token on whose way no sum can overflow has its answer, whatever becomes of the others.
        small = truth[index].peak <= largest / 2
        if not small.all():
            trial.outcomes[loader] = "overflows"
        expected, magnitude = truth[index].answer[small], truth[index].magnitude[small]
        if not answer[small].isfinite().all():
            trial.faults.append(f"{loader}: layer {index} answers with NaN or Inf")
            continue
        # And half a step between numbers of the dtype there, by which the answer itself is rounded, and one of the
        # smallest. Where one number is all of an answer that is more than the tolerance of bf16.
        steps = torch.finfo(answer.dtype)
        step = expected.abs() * steps.eps / 2 + steps.smallest_normal * steps.eps
        if not ((answer[small] - expected).abs() <= tolerance[answer.dtype] * (magnitude + 1e-6) + step).all():
            trial.faults.append(f"{loader}: layer {index} answers otherwise than its restored experts")


def _own_cause(err: BaseException) -> ResMoEError | None:
    """An error of this project that another one was raised from, and whose sentence it says."""
    seen: BaseException | None = err
    while seen is not None and not isinstance(seen, ResMoEError):
        seen = seen.__cause__ or seen.__context__
    return seen if seen is not None and str(seen) in str(err) else None


def _own_frame(err: BaseException) -> bool:
    """Whether code of this project, and not only of its tests, is on the way to an error."""
    steps = err.__traceback__
    while steps is not None:
        if Path(steps.tb_frame.f_code.co_filename).is_relative_to(TOP):
            parts = Path(steps.tb_frame.f_code.co_filename).relative_to(TOP).parts
            if parts[0] in OURS:
                return True
        steps = steps.tb_next
    return False


def _where(err: BaseException) -> str:
    """The last lines of this repository on the way to an error."""
    places, step = [], err.__traceback__
    while step is not None:
        places.append(f"{Path(step.tb_frame.f_code.co_filename).name}:{step.tb_lineno}")
        step = step.tb_next
    return " ".join(places[-4:])


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def forget_peak() -> None:
    """Begin to count the peak of resident memory anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Peak of resident memory since ``forget_peak``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
