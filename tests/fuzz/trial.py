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

from compress_tools.errors import ResMoEError
from tests.fuzz import loaders
from tests.fuzz.mutants import CANARY_VARIABLE, Mutant
from tests.fuzz.seeds import write_files

# Bytes beyond those that were resident before: checkpoints are of less than 1 MiB.
MEMORY_LIMIT = 64 * 2**20
# Of the seed with a draft: transformers has no place for it, so that it never reads what restore refuses.
DRAFT_LAYER = "model.layers.2."
# What `verify` says where a plain tensor is missing, or has another name.
INCOMPLETE = "incomplete: there is no"
# In units of the model's rounding: what sums of two orders can differ by.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}


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
            elif (theirs or _in_their_config(err)) and not isinstance(err, MemoryError | AssertionError):
                self.outcomes[loader] = "theirs"
                self.sentences[loader] = f"{type(err).__name__}: {str(err)[:200]}"
            else:
                self.outcomes[loader] = "fault"
                self.faults.append(f"{loader}: {type(err).__name__}: {str(err)[:300]}; {_where(err)}")
        taken = peak_bytes() - before
        # vLLM's own imports, at the first model of a process, take more.
        if taken > MEMORY_LIMIT and loader != "vllm":
            self.faults.append(f"{loader}: took {taken >> 20} MiB")
        return answer

    def _refused(self, loader: str, err: ResMoEError) -> None:
        self.outcomes[loader], sentence = "refused", str(err)
        self.sentences[loader] = sentence
        if "\n" in sentence or len(sentence) < 20 or len(sentence) > 2000 or re.search(r"Errno|Traceback", sentence):
            self.faults.append(f"{loader}: not a sentence: {sentence[:300]!r}")


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
            _compare_layers(trial, answers, truth)
    return trial


def _judge(trial: Trial, folder: Path, dense: Path, *, whole: bool) -> None:
    trial.call("verify", lambda: loaders.by_verify(folder), theirs=False)
    try:
        loaders.expect_block(folder)
    except ResMoEError:
        # Not a ResMoE checkpoint to vLLM and transformers, which never ask this project.
        trial.outcomes["transformers"] = trial.outcomes["plugin"] = "theirs"
        return
    ours = trial.mutant.ours
    without_weights = not any(name.endswith(".safetensors") for name in trial.mutant.files)
    theirs = not ours or without_weights
    logits = trial.call("transformers", lambda: loaders.by_transformers(folder), theirs=theirs)
    answers = trial.call("plugin", lambda: loaders.by_plugin(folder), theirs=False)
    if logits is not None:
        expected = trial.call("restore", lambda: loaders.by_restore(folder, dense), theirs=theirs)
        _compare(trial, "transformers", logits, expected)
    if answers is not None:
        truth = trial.call("truth", lambda: loaders.layer_truth(folder), theirs=False)
        _compare_layers(trial, answers, truth)
    if whole:
        theirs = theirs or INCOMPLETE in trial.sentences.get("verify", "")
        trial.call("vllm", lambda: loaders.by_vllm(folder), theirs=theirs)


def _compare(trial: Trial, loader: str, found: torch.Tensor, expected: torch.Tensor | None) -> None:
    if expected is None:
        refusal = trial.sentences.get("restore", "")
        if "the restored weights are beyond" in refusal:
            trial.outcomes[loader] = "overflows"
        elif trial.outcomes["restore"] != "theirs" and not (loader == "transformers" and DRAFT_LAYER in refusal):
            trial.faults.append(f"{loader}: serves what restore refuses: {refusal}")
        return
    if not expected.isfinite().all():
        trial.outcomes[loader] = "overflows"
        return
    if not found.isfinite().all():
        trial.faults.append(f"{loader}: not finite, the restored checkpoint's logits are")
        return
    if not trial.mutant.ours or INCOMPLETE in trial.sentences.get("verify", ""):
        # transformers makes random weights where a plain one is missing, and says so, here as in a dense checkpoint.
        return
    scale = max(1.0, float(expected.abs().max()))
    worst = float((found.float() - expected.float()).abs().max()) / scale
    if not worst <= TOLERANCE[found.dtype]:
        trial.faults.append(f"{loader}: logits differ from the restored checkpoint's by {worst:.3g}")


def _compare_layers(
    trial: Trial,
    answers: dict[int, torch.Tensor],
    truth: tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]] | None,
) -> None:
    if truth is None:
        trial.faults.append(f"plugin: serves what the format's reader refuses: {trial.sentences.get('truth')}")
        return
    for index, answer in answers.items():
        expected, magnitude = truth[0][index], truth[1][index]
        largest = torch.finfo(torch.float16 if answer.dtype == torch.float16 else torch.float32).max
        if float(magnitude.max()) > largest / 2 or not magnitude.isfinite().all():
            trial.outcomes["plugin"] = "overflows"
        elif not answer.isfinite().all():
            trial.faults.append(f"plugin: layer {index} answers with NaN or Inf")
        elif not ((answer.double() - expected).abs() <= TOLERANCE[answer.dtype] * (magnitude + 1e-6)).all():
            trial.faults.append(f"plugin: layer {index} answers otherwise than its restored experts")


def _own_cause(err: BaseException) -> ResMoEError | None:
    """An error of this project that another one was raised from."""
    seen: BaseException | None = err
    while seen is not None and not isinstance(seen, ResMoEError):
        seen = seen.__cause__ or seen.__context__
    return seen


def _in_their_config(err: BaseException) -> bool:
    """transformers turns every `dtype` of config.json into text, the block's too, before it asks what a block is."""
    return re.search(r"configuration_utils\.py:\d+$", _where(err)) is not None


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
