"""Changed checkpoints by coverage: ``python -m tests.fuzz.guided SECONDS``, with atheris, which is installed by hand.

libFuzzer's bytes decide which checkpoint is changed and how; it keeps those that reach new lines of this project. Each
mutant goes through ``verify`` and the plugin; transformers' own code is not looked at.
"""

import os
import sys
import tempfile
from pathlib import Path

import atheris

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

with atheris.instrument_imports(include=["compress_tools", "resmoe_vllm"]):
    from tests.fuzz import loaders
    from tests.fuzz.mutants import ByteRandom, mutate
    from tests.fuzz.seeds import Seed, make_seeds
    from tests.fuzz.trial import try_served

SEEDS: list[Seed] = []


def try_bytes(content: bytes) -> None:
    """One input of libFuzzer's; raises on a fault, which ends the run and keeps the input."""
    pick = ByteRandom(content)
    seed = pick.choice(SEEDS)
    mutant = mutate(seed.name, seed.files, pick)
    if faults := try_served(mutant).faults:
        raise SystemExit(f"{mutant.seed}: {'; '.join(mutant.changes)}: {faults}")


def main() -> None:
    """Run for so many seconds; libFuzzer prints what it counts."""
    loaders.register()
    with tempfile.TemporaryDirectory(prefix="resmoe-fuzz-seeds-") as name:
        SEEDS.extend(make_seeds(Path(name)))
    options = [
        f"-max_total_time={sys.argv[1]}",
        "-max_len=128",
        "-timeout=60",
        "-rss_limit_mb=8192",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options], try_bytes)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
