"""Instructions are counted in the loops of a kernel's machine code, and become seconds of an H200."""

import pytest

from benchmarks.row_kernel import H200, Pass, loops

SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;                     /* 0x0000000000007919 */
                                                                          /* 0x000e220000002500 */
        /*0010*/               @P0 BRA 0x60 ;                             /* 0x00000018002c0947 */
        /*0020*/              @!P1 LDG.E R4, desc[UR4][R2.64] ;           /* 0x0000000000007919 */
        /*0030*/                   MUFU.EX2 R5, R4 ;                      /* 0x0000000000007919 */
        /*0040*/             @!UP2 FMUL.FTZ R5, R5, 1.5 ;                 /* 0x0000000000007919 */
        /*0050*/              @!P3 BRA 0x20 ;                             /* 0xffffffe80010b947 */
        /*0060*/                   EXIT ;                                 /* 0x000000000000794d */
        /*0070*/                   BRA 0x70;                              /* 0xfffffffc00fc7947 */
"""


def test_instructions_of_a_loop():
    assert list(loops(SASS)) == [{"LDG": 1, "MUFU": 1, "FMUL": 1, "BRA": 1}]


def test_seconds_of_each_unit():
    """One entry a lane in every lane of the card, one cycle each: so many warps take an H200 one cycle."""
    one = Pass(instructions=1.0, cycles={"special functions": 8.0}, bytes=2.0)
    seconds = one.seconds(132 * 4 * 32, H200)
    assert seconds["issue"] == pytest.approx(1 / 1.98e9)
    assert seconds["special functions"] == pytest.approx(8 / 1.98e9)
    assert seconds["memory"] == pytest.approx(132 * 4 * 32 * 2 / 4.8e12)
