"""What each card gives a block of threads, by its maker's own tables, and how many blocks fit beside each other."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

# CUDA keeps this much of a multiprocessor's shared memory for itself, for every block.
RESERVED_BYTES = 1024


@dataclass(frozen=True)
class Card:
    """One architecture.

    Attributes:
        name: as rows and options have it.
        sold_as: cards that have it.
        block_bytes: shared memory that one block may ask for.
        unit_bytes: shared memory of one multiprocessor, or compute unit.
        unit_threads: threads that one holds at most.
    """

    name: str
    sold_as: str
    block_bytes: int
    unit_bytes: int
    unit_threads: int

    @property
    def amd(self) -> bool:
        """Compiled by LLVM alone."""
        return self.name.startswith("gfx")

    @property
    def target(self) -> GPUTarget:
        """What Triton compiles for."""
        return GPUTarget("hip", self.name, 64) if self.amd else GPUTarget("cuda", int(self.name[3:]), 32)

    def blocks(self, shared: int, registers: int, warps: int) -> int:
        """Blocks that one multiprocessor runs at a time."""
        by_threads = self.unit_threads // (warps * self.target.warp_size)
        if self.amd:
            # four SIMDs with 512 registers a lane, given out by eights
            waves = 4 * (512 // max(8, -(-registers // 8) * 8))
            return min(by_threads, waves // warps, self.unit_bytes // max(1, shared))
        # a warp's registers are given out by 256
        by_registers = 65536 // (warps * -(-registers * 32 // 256) * 256)
        return min(by_threads, by_registers, self.unit_bytes // (shared + RESERVED_BYTES))


CARDS = {
    card.name: card
    for card in (
        Card("sm_80", "A100", 166912, 167936, 2048),
        Card("sm_86", "RTX 3090, A10, A40", 101376, 102400, 1536),
        Card("sm_89", "L4, L40S, RTX 4090", 101376, 102400, 1536),
        Card("sm_90", "H100, H200", 232448, 233472, 2048),
        Card("sm_100", "B200", 232448, 233472, 2048),
        Card("sm_120", "RTX 5090", 101376, 102400, 1536),
        Card("gfx942", "MI300X", 65536, 65536, 2048),
    )
}
