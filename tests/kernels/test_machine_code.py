import pytest

pytest.importorskip("triton")

from fastgan.kernels.machine_code import count_in_loops, loops

# As nvdisasm prints it: a loop with another within it, from which a third, that waits, was moved behind the end.
ASSEMBLY = """
        /*0000*/                   STL.64 [R1], R2 ;
        /*0010*/              @P0 BRA `(.L_x_2) ;
        /*0020*/                   LDL.LU R4, [R1+0x8] ;
.L_x_1:
        /*0030*/              @P3 LDL R5, [R1+0x4] ;
.L_x_3:
        /*0040*/                   STL [R1+0x4], R5 ;
        /*0050*/                   BRA.U UP0, `(.L_x_3) ;
        /*0060*/             @!P4 BRA `(.L_x_5) ;
.L_x_6:
        /*0070*/              @P2 BRA `(.L_x_1) ;
.L_x_2:
        /*0080*/                   LDL R6, [R1] ;
        /*0090*/                   EXIT ;
.L_x_5:
        /*00a0*/                   SYNCS R3 ;
        /*00b0*/              @P1 BRA `(.L_x_5) ;
        /*00c0*/                   BRA `(.L_x_6) ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
"""


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (("", ""), 2),
        (("@P2 BRA `(.L_x_1)", "NOP"), 1),  # the inner loop alone is left
        (("@P2 BRA `(.L_x_1)", "@P2 BRA `(.L_x_2)"), 1),
        (("SYNCS R3", "STL [R1], R3"), 3),
        (("@P2 BRA `(.L_x_1)", "BRA `(.L_x_1)"), 2),
        (("EXIT", "@P0 EXIT"), 3),  # falls into the loop behind the end, and so comes back
    ],
)
def test_local_memory_counts_where_control_comes_back(change, count):
    assert count_in_loops(ASSEMBLY.replace(*change)) == count


def test_loops_hold_the_loops_within_them():
    (outer,) = loops(ASSEMBLY)
    # The outer loop is entered at .L_x_2's test of the predicate or falls into .L_x_1; one loop turns on itself within
    # it, the one that waits does so behind the end.
    assert sorted(len(loop.positions) for loop in outer.inner) == [2, 2]
    assert [text.split()[0] for loop in outer.inner for text in loop.own] == ["STL", "BRA.U", "SYNCS", "@P1"]
    assert set(outer.own) | {text for loop in outer.inner for text in loop.own} == set(outer.all())
    assert len(list(outer.all())) == len(outer.positions)
