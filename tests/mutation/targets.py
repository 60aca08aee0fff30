"""What is mutated, and which tests are asked: one row a folder, grouped by the tests that it needs."""

from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Target:
    """Modules that the same tests look at.

    Attributes:
        name: of the row in the table.
        modules: files, by patterns relative to the repository.
        tests: pytest's paths; which of them reach a mutant's line is measured.
        preload: imported before the processes that try a mutant are forked.
    """

    name: str
    modules: tuple[str, ...]
    tests: tuple[str, ...]
    preload: tuple[str, ...] = ()

    def files(self) -> list[Path]:
        """The files, relative to the repository."""
        found = {file for pattern in self.modules for file in REPOSITORY.glob(pattern)}
        return sorted(file.relative_to(REPOSITORY) for file in found if file.name != "__init__.py")


_TOOLS = "tests/compress_tools"
TARGETS = (
    Target("format", ("compress_tools/format/**/*.py",), (f"{_TOOLS}/format", f"{_TOOLS}/residuals")),
    Target(
        "residuals",
        tuple(
            f"compress_tools/residuals/{name}.py"
            for name in ("budget", "recipes", "quantizer", "prune", "low_rank", "quantize", "registry")
        ),
        (f"{_TOOLS}/residuals",),
    ),
    Target("evaluation", ("compress_tools/evaluation/*.py",), (f"{_TOOLS}/evaluation",)),
    Target("planner", ("compress_tools/planner/*.py",), (f"{_TOOLS}/planner",)),
    Target(
        "verify and report",
        ("compress_tools/stored/verify.py", "compress_tools/report.py"),
        (f"{_TOOLS}/stored", f"{_TOOLS}/test_report.py"),
    ),
    Target(
        "output",
        ("compress_tools/output/*.py",),
        (f"{_TOOLS}/output", f"{_TOOLS}/slices"),
    ),
    Target(
        "slices",
        ("compress_tools/slices/*.py",),
        (f"{_TOOLS}/slices", f"{_TOOLS}/output/test_destination.py", f"{_TOOLS}/output/test_disk.py"),
    ),
    Target(
        "the plugin's loaders",
        ("resmoe_vllm/weights/*.py", "resmoe_vllm/fused_moe.py", "resmoe_vllm/config.py"),
        (
            "tests/resmoe_vllm/weights",
            "tests/resmoe_vllm/test_vllm_refusals.py",
            "tests/resmoe_vllm/test_vllm_methods.py",
        ),
        ("vllm",),
    ),
)
