"""Loops, loads and registers read out of machine code, on code short enough to count by hand."""

from pathlib import Path

import pytest

from benchmarks.compiled.cards import CARDS
from benchmarks.compiled.machine_code import amdgcn_loops, function_at, sass_loops

HERE = Path(__file__)
# Two loops with products, the first around another one that only waits; rare code behind the end jumps back into it.
SASS = f"""
	//## File "{HERE}", line 1
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR8][R4.64] ;
        /*0020*/               @P1 BRA `(.L_x_9) ;
.L_x_2:
        /*0030*/                   LDS R6, [R7] ;
        /*0040*/              @!P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   HMMA.16816.F32.BF16 R8, R12, R14, R8 ;
        /*0070*/                   HMMA.16816.F32.BF16 R8, R12, R14, R8 ;
        /*0078*/                   STL.64 [R1+0x8], R8 ;
        /*0080*/               @P2 BRA `(.L_x_1) ;
.L_x_4:
        /*0090*/                   LDG.E.U16.CONSTANT R20, desc[UR8][R4.64] ;
        /*00a0*/                   LDG.E.128 R24, desc[UR8][R4.64] ;
        /*00b0*/                   HGMMA.64x128x16.F32.BF16 R24, R28, gdesc[UR4], R24 ;
        /*00c0*/                   BRA.U UP0, `(.L_x_4) ;
        /*00d0*/                   EXIT ;
.L_x_9:
        /*00e0*/                   MOV R3, R4 ;
        /*00f0*/                   BRA `(.L_x_3) ;
"""
AMD = f"""
	.file	1 "{HERE.parent}" "{HERE.name}"
	.loc	1 1 0
	s_mov_b32 s0, 0
.LBB0_1:                                ; =>This Inner Loop
	global_load_ushort v1, v[2:3], off
	s_barrier
	v_mfma_f32_16x16x16_bf16 v[4:7], v[8:9], v[10:11], v[4:7]
	s_cbranch_scc1 .LBB0_1
	s_endpgm
"""


def test_main_loops_of_sass() -> None:
    around, last = sorted(sass_loops(SASS), key=lambda loop: -loop.instructions)
    # rare code that comes back into the loop is a part of it
    assert (around.instructions, around.barriers, around.products, around.copies) == (11, 1, 2, 1)
    assert (around.spilled, last.spilled) == (1, 0)
    assert around.macs == 2 * 16 * 8 * 16
    assert around.per_column(16) == 11 * 32 * 16 / around.macs
    assert (last.instructions, last.products, last.copies, last.loads) == (4, 1, 0, 2)
    # four warps do it together
    assert last.macs == 64 * 128 * 16 // 4
    assert last.two_bytes == {"unknown": 1}


def test_main_loops_of_amd() -> None:
    (loop,) = amdgcn_loops(AMD)
    assert (loop.instructions, loop.barriers, loop.products, loop.loads) == (4, 1, 1, 1)
    assert loop.per_column(16) is None


def test_a_load_is_of_who_called_the_function_that_loads_anything() -> None:
    lines = HERE.read_text().splitlines()
    inner, outer = (1 + lines.index(f"def {name}() -> None:") for name in ("_load_lanes", "_scales_of_a_row"))
    chain = f"""
	//## File "{HERE}", line {{line}} inlined at "{HERE}", line {outer + 1}
	//## File "{HERE}", line {outer + 1}
        /*0000*/                   LDG.E.U16 R20, desc[UR8][R4.64] ;
        /*0010*/                   HMMA.16816.F32.BF16 R8, R12, R14, R8 ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
"""
    # a load's own line is one behind its function's last: it is the second of two lines of assembly
    for line in (inner, inner + 2):
        (loop,) = sass_loops(".L_x_1:" + chain.format(line=line))
        assert loop.two_bytes == {"_scales_of_a_row": 1}
    amd = AMD.replace(".loc	1 1 0", f".loc	1 {inner} 4  ; {HERE.name}:{inner}:4 @[ {HERE.name}:{outer}:9 ]")
    (loop,) = amdgcn_loops(amd)
    assert loop.two_bytes == {"_scales_of_a_row": 1}


@pytest.mark.parametrize(("load", "wide"), [("LDG.E.U16", 0), ("LDG.E.U8", 0), ("LDG.E", 1), ("LDG.E.64", 1)])
def test_kept_values_that_are_loaded_together(load: str, wide: int) -> None:
    line = 1 + HERE.read_text().splitlines().index("def _kept_column() -> None:")
    code = f"""
.L_x_1:
	//## File "{HERE}", line {line}
        /*0000*/                   {load} R20, desc[UR8][R4.64] ;
        /*0010*/                   HMMA.16816.F32.BF16 R8, R12, R14, R8 ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
"""
    (loop,) = sass_loops(code)
    assert (loop.loads, loop.wide_gathers) == (1, wide)


def _kept_column() -> None:
    """As the kernels' function of this name."""


def _load_lanes() -> None:
    """As the kernels' function of this name."""


def _scales_of_a_row() -> None:
    """Stands where a kernel calls it."""


def test_a_kernel_without_products_has_no_main_loop() -> None:
    assert sass_loops(".L_x_1:\n        /*0000*/      LDS R6, [R7] ;\n        /*0010*/  @P0 BRA `(.L_x_1) ;\n") == []


def test_function_of_a_line() -> None:
    line = 1 + HERE.read_text().splitlines().index("def test_function_of_a_line() -> None:")
    assert function_at(str(HERE), line + 1) == "test_function_of_a_line"
    assert function_at(str(HERE), 3) == "unknown"
    assert function_at("/no/such/file.py", 1) == "unknown"


@pytest.mark.parametrize(
    ("card", "shared", "registers", "warps", "blocks"),
    [
        ("sm_90", 122880, 128, 4, 1),  # shared memory
        ("sm_90", 113664, 128, 4, 2),
        ("sm_90", 0, 255, 4, 2),  # registers
        ("sm_89", 0, 32, 16, 3),  # threads
        ("sm_89", 122880, 128, 4, 0),
        ("gfx942", 32768, 128, 4, 2),
        ("gfx942", 0, 256, 4, 2),
        ("gfx942", 0, 300, 4, 1),
    ],
)
def test_blocks_on_a_multiprocessor(card: str, shared: int, registers: int, warps: int, blocks: int) -> None:
    assert CARDS[card].blocks(shared, registers, warps) == blocks
