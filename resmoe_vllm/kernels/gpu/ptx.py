"""Programs of PTX for the assembler inside of kernels: a register for each value, and where they can run."""

from collections.abc import Sequence

from triton import knobs
from triton.language.target_info import current_target
from triton.runtime.jit import constexpr_function

# The first card that computes pairs of bfloat16.
_FIRST_CARD = 80


class Program:
    """Lines of PTX; every value has a register of its own."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, operation: str, *operands: str | int) -> str:
        """The register of an operation's result."""
        register = f"v{len(self.lines)}"
        words = [own if isinstance(own, str) else hex(own) for own in operands]
        self.lines.append(f"{operation} {register}, {', '.join(words)};")
        return register

    def sum(self, values: Sequence[str]) -> str:
        """Of bytes, none of which overflows."""
        total = values[0]
        for value in values[1:]:
            total = self("add.u32", total, value)
        return total

    def text(self, pairs: Sequence[str]) -> str:
        """The whole program; ``pairs`` hold columns 0 and 1, ..., 6 and 7."""
        stores = [f"mov.b32 {{${2 * number}, ${2 * number + 1}}}, {pair};" for number, pair in enumerate(pairs)]
        return "\n".join(["{", f".reg .b32 v<{len(self.lines)}>;", *self.lines, *stores, "}"])


@constexpr_function
def runs_ptx() -> bool:
    """Whether kernels are compiled for a card that runs them; the interpreter has no assembler."""
    target = current_target()
    return (
        not knobs.runtime.interpret and target is not None and target.backend == "cuda" and target.arch >= _FIRST_CARD
    )
