"""The steps of the day in their order, and what the rehearsal makes of them."""

import sys
from dataclasses import dataclass

# in all, of a visit
MINUTES = 25


@dataclass(frozen=True)
class Step:
    """One step, a process of its own.

    Attributes:
        name: also of its files.
        seconds: its limit.
        why: what it shows, for the table.
        vital: what comes after it is worth nothing without it.
    """

    name: str
    seconds: int
    why: str
    vital: bool = False

    def command(self, folder: str, *, rehearse: bool) -> list[str]:
        """What is run."""
        return [
            sys.executable, "-m", "benchmarks.gpu_day.steps", self.name, "--folder", folder,
            *(["--rehearse"] if rehearse else []),
        ]  # fmt: skip


STEPS = (
    Step("environment", 60, "card, driver, versions; a kernel of Triton runs at all", vital=True),
    Step("correctness", 240, "every coder against the reference, bf16 and fp16", vital=True),
    Step("sanitizer", 150, "no access out of bounds: compute-sanitizer on small layers, K = 1 and 8"),
    Step("profile", 150, "each kernel of an OLMoE layer at T = 1 and 64"),
    Step("kernels", 300, "one layer of each shape against vLLM's dense and 4-bit layers"),
    Step("serve-olmoe", 300, "`vllm serve` of a synthetic OLMoE against its restored twin, and throughput"),
    Step("serve-qwen3", 300, "the same of a synthetic Qwen3-30B"),
)
