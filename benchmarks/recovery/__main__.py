"""`make recovery`, `python -m benchmarks.recovery [--original DIR] [--compressed DIR] [--least 0.95] [--out DIR]`.

Exit code 1 where the compressed model keeps less of the original's score than asked for. The original's score is kept
in OUT, and asked for again only where the model, the questions or a program that decides it is another.
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness.environment import collect_environment
from benchmarks.models.prepared import compress, ensure_reference_model
from benchmarks.models.reference_models import preset_config
from benchmarks.recovery.questions import QUESTIONS, best_constant, questions
from compress_tools.errors import CheckpointError, ConfigError, ResMoEError

TASKS = Path(__file__).with_name("tasks")
TASK, METRIC = "next_word", "acc,none"
LEAST = 0.95
# Standard errors by which an original must be better than the best constant answer: of less, no share says anything.
MIN_SIGMAS = 3
# What a score hangs on, of a checkpoint.
SCORED = ("*.safetensors", "config.json", "tokenizer*")


@dataclass(frozen=True)
class Kept:
    """Two scores and the gate.

    Attributes:
        base: the original's share of right answers.
        kept: the compressed model's.
        constant: of who says the same word each time, the best one for it.
        asked: questions.
        least: share of ``base`` that ``kept`` must be.
    """

    base: float
    kept: float
    constant: float
    asked: int
    least: float = LEAST

    @property
    def share(self) -> float:
        """Of the original's score."""
        return self.kept / self.base if self.base else 0.0

    @property
    def must_be_above(self) -> float:
        """What an original that knows no more than the best constant answer would hardly reach."""
        return self.constant + MIN_SIGMAS * math.sqrt(self.constant * (1 - self.constant) / self.asked)

    def verdict(self) -> tuple[bool, str]:
        """Whether the gate is passed, and a sentence with the numbers."""
        numbers = (
            f"{self.asked} questions, right: original {self.base:.4f}, compressed {self.kept:.4f}, the best constant "
            f"answer {self.constant:.4f}"
        )
        if self.base <= self.must_be_above:
            return False, (
                f"FAILED: {numbers}. An original at {self.must_be_above:.4f} or less may know no more than that, and "
                "what is kept of it says nothing; give a model that can do the task, or ask more questions"
            )
        passed = self.share >= self.least
        return passed, (
            f"{'passed' if passed else 'FAILED'}: {numbers}. {self.share:.3f} of the original's score is kept; "
            f"at least {self.least} is asked for"
        )


def main(argv: list[str] | None = None) -> int:
    """Train and compress where nothing is given, ask both, compare, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__)
    parser.add_argument("--original", type=Path, help="dense checkpoint; trained into OUT if absent, in minutes")
    parser.add_argument("--compressed", type=Path, help="ResMoE checkpoint of it; made in OUT by default if absent")
    parser.add_argument("--least", type=float, default=LEAST, help=f"share of the score to be kept (default {LEAST})")
    parser.add_argument("--limit", type=int, help=f"ask only so many of the {QUESTIONS} questions")
    parser.add_argument("--out", type=Path, default=Path("build/recovery"), help="folder of all that is made and kept")
    args = parser.parse_args(argv)
    if not 0 < args.least <= 1:
        parser.error(f"--least {args.least}: must be above 0 and at most 1")
    if args.limit is not None and not 0 < args.limit <= QUESTIONS:
        parser.error(f"--limit {args.limit}: must be from 1 to {QUESTIONS}")
    if args.compressed is not None and args.original is None:
        parser.error("--compressed: give --original too, the checkpoint that it was made from")
    console = Console(stderr=True)
    try:
        for folder in filter(None, (args.original, args.compressed)):
            checkpoint_files(folder)
        if find_spec("lm_eval") is None:
            raise ConfigError("lm-eval is not installed; `make recovery` installs it, and pip install 'resmoe[eval]'")
        original, compressed = args.original, args.compressed
        if original is None:
            original = args.out / "original"
            ensure_reference_model(preset_config("demo"), original, console)
        if compressed is None:
            compressed = args.out / "compressed"
            compress(original, compressed, console=console)
        base, cached = cached_score(original, args.limit, args.out / "base.json")
        if cached:
            console.print(f"{original}: score kept from before in {args.out / 'base.json'}", highlight=False)
        asked = args.limit or QUESTIONS
        kept = Kept(base, score(compressed, args.limit), best_constant(questions()[:asked]), asked, args.least)
    except ResMoEError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    passed, sentence = kept.verdict()
    print(f"{TASK}: {sentence}")
    return 0 if passed else 1


def cached_score(model: Path, limit: int | None, cache: Path) -> tuple[float, bool]:
    """The score of a model, and whether it was known before.

    Args:
        model: checkpoint.
        limit: of questions.
        cache: JSON file of scores by ``fingerprint``; made where it is absent.
    Raises:
        CheckpointError: the model can't be asked.
        ConfigError: the file is no such file.
    """
    known = _read_cache(cache)
    key = fingerprint(model, limit)
    if key in known:
        return known[key], True
    found = score(model, limit)
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps({**known, key: found}, indent=1) + "\n")
    return found, False


def _read_cache(cache: Path) -> dict[str, float]:
    if not cache.exists():
        return {}
    try:
        known = json.loads(cache.read_text())
        return {str(key): float(value) for key, value in known.items()}
    except (ValueError, AttributeError, TypeError) as err:
        raise ConfigError(f"{cache}: expected scores by fingerprint, found something else: {err}; remove it") from err


def checkpoint_files(model: Path) -> list[Path]:
    """The files of a checkpoint that decide its score.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    files = sorted({path for pattern in SCORED for path in model.glob(pattern)})
    if not any(path.suffix == ".safetensors" for path in files):
        raise CheckpointError(f"{model}: found no weights (*.safetensors), expected a checkpoint's directory")
    return files


def fingerprint(model: Path, limit: int | None) -> str:
    """A digest of a checkpoint's files, the questions, their number, and the programs that ask them."""
    programs = {name: version(name) for name in ("lm_eval", "vllm", "torch", "transformers")}
    asked = [limit, programs, questions(), *(path.read_text() for path in sorted(TASKS.glob("*.*")))]
    digest = hashlib.sha256(json.dumps(asked).encode())
    for path in checkpoint_files(model):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()} ".encode())
    return digest.hexdigest()


def score(model: Path, limit: int | None) -> float:
    """`resmoe eval MODEL --tasks next_word`, in a process of its own.

    Raises:
        CheckpointError: it failed; the reason is on stderr, from the command itself.
    """
    command = [
        sys.executable, "-m", "compress_tools", "eval", str(model), "--tasks", TASK, "--include-path", str(TASKS),
        *([] if limit is None else ["--limit", str(limit)]), "--json",
    ]  # fmt: skip
    env = dict(os.environ)
    if collect_environment().gpu is None:
        # vLLM would take nearly all of the machine's memory for the KV cache.
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=False)
    if done.returncode:
        raise CheckpointError(f"`resmoe {' '.join(command[3:])}` ended with exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return float(found[TASK][METRIC])


if __name__ == "__main__":
    sys.exit(main())
