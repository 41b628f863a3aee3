"""The machine: what it executes, in which order, and what it refuses."""

import numpy as np
import pytest
from emulator import EmulationError, parse, prepare
from ptx_snippets import evaluate, program, run

LANES = np.arange(32)


def by_thread(body, threads=32, grid=(1, 1, 1), **options):
    """Run statements that leave a word in %w0, and return it for each block and thread."""
    blocks = len(options["only"]) if options.get("only") is not None else int(np.prod(grid))
    out = np.zeros((int(np.prod(grid)) if blocks < 2**16 else blocks, threads), np.uint32)
    store = """
        mov.u32 %w100, %tid.x;
        mov.u32 %w101, %ctaid.x;
        mov.u32 %w102, %ctaid.y;
        mov.u32 %w103, %nctaid.x;
        mad.lo.s32 %w101, %w102, %w103, %w101;
        mad.lo.s32 %w101, %w101, THREADS, %w100;
        mul.wide.u32 %l10, %w101, 4;
        add.s64 %l10, %l10, %l20;
        st.global.b32 [%l10], %w0;
    """.replace("THREADS", str(threads))
    run(body + store, out, threads=threads, grid=grid, **options)
    return out


def test_blocks_that_part_at_a_loop_each_go_on():
    """As many turns as the number of the block, added up."""
    made = by_thread(
        """
        mov.u32 %w1, %ctaid.x;
        mov.u32 %w0, 0;
        $top:
        setp.eq.u32 %p1, %w1, 0;
        @%p1 bra $done;
        add.u32 %w0, %w0, %w1;
        sub.u32 %w1, %w1, 1;
        bra.uni $top;
        $done:
        """,
        grid=(9, 1, 1),
    )
    expected = [n * (n + 1) // 2 for n in range(9)]
    np.testing.assert_array_equal(made, np.repeat(np.array(expected)[:, None], 32, axis=1))


COLLATZ = """
    mov.u32 %w1, %tid.x;
    mov.u32 %w5, %ctaid.x;
    mad.lo.u32 %w1, %w5, 32, %w1;
    add.u32 %w1, %w1, 1;
    mov.u32 %w0, 0;
    $top:
    setp.le.u32 %p1, %w1, 1;
    @%p1 bra $done;
    and.b32 %w2, %w1, 1;
    setp.ne.u32 %p2, %w2, 0;
    add.u32 %w0, %w0, 1;
    @%p2 bra $odd;
    shr.u32 %w1, %w1, 1;
    bra $top;
    $odd:
    mad.lo.u32 %w1, %w1, 3, 1;
    bra $top;
    $done:
"""


def test_threads_that_part_meet_again():
    """The lengths of Collatz sequences: branches that every thread takes in its own order."""

    def length(n):
        steps = 0
        while n > 1:
            n, steps = (3 * n + 1 if n % 2 else n // 2), steps + 1
        return steps

    # The shuffle after the loop needs all threads of a warp at the same time.
    body = COLLATZ + "shfl.sync.idx.b32 %w0, %w0, 26, 31, -1;"
    np.testing.assert_array_equal(
        by_thread(COLLATZ, grid=(3, 1, 1)).ravel(), [length(n) for n in range(1, 97)]
    )
    np.testing.assert_array_equal(by_thread(body), np.full((1, 32), length(27)))


def test_some_threads_and_some_blocks_return_early():
    out = np.zeros((4, 32), np.uint32)
    run(
        """
        mov.u32 %w1, %tid.x;
        mov.u32 %w2, %ctaid.x;
        mad.lo.s32 %w3, %w2, 32, %w1;
        mul.wide.u32 %l10, %w3, 4;
        add.s64 %l10, %l10, %l20;
        setp.eq.u32 %p1, %w2, 2;
        @%p1 ret;
        setp.lt.u32 %p2, %w1, %w2;
        @%p2 exit;
        st.global.b32 [%l10], 7;
        """,
        out,
        grid=(4, 1, 1),
    )
    expected = np.where(LANES >= np.arange(4)[:, None], 7, 0)
    expected[2] = 0
    np.testing.assert_array_equal(out, expected)


def test_a_grid_has_three_dimensions():
    body = """
        mov.u32 %w1, %ctaid.x;
        mov.u32 %w2, %ctaid.y;
        mov.u32 %w3, %nctaid.y;
        mad.lo.u32 %w0, %w1, %w3, %w2;
    """
    made = by_thread(body, grid=(3, 5, 1))
    x, y = np.meshgrid(np.arange(3), np.arange(5))
    np.testing.assert_array_equal(made[:, 0], (x * 5 + y).ravel())


def test_many_blocks_run_in_parts():
    made = by_thread("mov.u32 %w0, %ctaid.x;", threads=128, grid=(1500, 1, 1))
    np.testing.assert_array_equal(made[:, 0], np.arange(1500))


def test_only_the_chosen_programs_run():
    made = by_thread("mov.u32 %w0, 1;", grid=(6, 1, 1), only=[1, 4])
    np.testing.assert_array_equal(made[:, 0], [0, 1, 0, 0, 1, 0])


def test_numbers_of_programs_beyond_int32_do_not_matter():
    out = np.zeros(1, np.uint32)
    body = "mov.u32 %w1, %ctaid.x; st.global.b32 [%l20], %w1;"
    run(body, out, grid=(2**31 - 1, 3, 1), only=[2 * (2**31 - 1) + 5])
    assert out[0] == 5


@pytest.mark.parametrize("grid", [(2**31, 1, 1), (1, 65536, 1), (1, 1, 65536), (0, 1, 1)])
def test_a_grid_beyond_the_limits_is_refused(grid):
    with pytest.raises(EmulationError, match=r"grid\.[xyz] must be from 1 to"):
        run("", grid=grid, only=[])


def test_parameters_of_every_type():
    types = ("u32", "s32", "u64", "f32", "f64")
    out = np.zeros(5, np.uint64)
    run(
        """
        ld.param.b32 %w1, [q0]; cvt.u64.u32 %l1, %w1; st.global.b64 [%l20], %l1;
        ld.param.s32 %l2, [q1]; st.global.b64 [%l20+8], %l2;
        ld.param.b64 %l3, [q2]; st.global.b64 [%l20+16], %l3;
        ld.param.b32 %w4, [q3]; cvt.u64.u32 %l4, %w4; st.global.b64 [%l20+24], %l4;
        ld.param.b64 %l5, [q4]; st.global.b64 [%l20+32], %l5;
        """,
        out,
        parameters=types,
        values=(2**32 - 1, -2, 2**64 - 3, 1.5, -0.1),
    )
    assert out[:3].tolist() == [2**32 - 1, 2**64 - 2, 2**64 - 3]
    assert out[3] == np.float32(1.5).view(np.uint32)
    assert out[4] == np.float64(-0.1).view(np.uint64)


def test_predicates_choose_threads():
    a = np.arange(64, dtype=np.uint32)
    made = evaluate(
        "mov.u32 %w0, 5; setp.lt.u32 %p1, %w1, 10;@%p1 mov.u32 %w0, 6; @!%p1 add.u32 %w0, %w0, 10;",
        32,
        a,
    )
    np.testing.assert_array_equal(made, np.where(a < 10, 6, 15))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "add.u32 %w0, %w1, 1;",
            r"%w1 is read and was never written: line \d+: add.u32 %w0, %w1, 1",
        ),
        ("frobnicate.b32 %w0, 1;", r"unknown instruction frobnicate.b32: line \d+: frobnicate"),
        # A modifier that would change the result.
        ("mov.u32 %w1, 1; add.cc.u32 %w0, %w1, 1;", "unknown instruction add.cc.u32"),
        ("mov.u32 %w1, 1; fma.rz.f32 %w0, %w1, %w1, %w1;", "unknown instruction fma.rz.f32"),
        ("mov.u32 %w1, 1; mul.wide.u64 %l0, %l20, %l20;", "unknown instruction mul.wide.u64"),
        ("mov.u32 %w1, 1; add.u64 %l0, %w1, 1;", "32 bits where 64 are read"),
        ("mul.wide.u32 %w0, 3, 3;", "the result has another width"),
        ("mov.u32 %w0, %clusterid.x;", "unknown register %clusterid.x"),
        ("add.u32 %nowhere, 1, 1;", "is no register"),
        ("add.u32 %w0, 1;", "2 operands are read, got 1"),
        ("bra $nowhere;", "label is unknown"),
        ("trap;", "stops by trap"),
        ("mov.u32 %w1, elsewhere;", "unknown name elsewhere"),
        ("add.f32 %w0, 0d3FF0000000000000, 0f3F800000;", "64 bits is read as one of 32"),
        (
            "mov.u32 %w1, %tid.x; setp.eq.u32 %p1, %w1, 3; @%p1 bra $end; bar.sync 0; $end: ",
            "a part of the threads: line .*bar.sync",
        ),
        (
            "mov.u32 %w1, %tid.x; setp.eq.u32 %p1, %w1, 3; @%p1 ldmatrix.sync.aligned.m8n8.x1"
            ".shared.b16 {%w2}, [%w1];",
            "only a part of a warp",
        ),
        (
            "mov.u32 %w1, %tid.x; setp.ne.u32 %p1, %w1, 3;"
            "@%p1 shfl.sync.bfly.b32 %w2, %w1, 1, 31, -1;",
            "reads from one that does not execute",
        ),
        ("shfl.sync.bfly.b32 %w2, 1, 1, 31, 0xFFFF;", "mask of members leaves out"),
    ],
)
def test_what_a_program_must_not_do(body, message):
    with pytest.raises(EmulationError, match=message):
        run(body, np.zeros(1, np.uint32))


def test_threads_that_wrote_nothing_hold_no_number():
    made = evaluate(
        "setp.lt.u32 %p1, %w1, 3; @%p1 mov.b32 %w0, 0f3F800000;", 32, np.arange(6, dtype=np.uint32)
    )
    np.testing.assert_array_equal(np.isnan(made.view(np.float32)), [False] * 3 + [True] * 3)


def test_a_module_must_be_understood():
    with pytest.raises(EmulationError, match=r"one \.entry, got 0"):
        parse("")
    with pytest.raises(EmulationError, match=r"must state its threads, in x alone, by \.reqntid"):
        parse(program("").replace(".reqntid 32", ""))
    with pytest.raises(EmulationError, match="in x alone"):
        parse(program("").replace(".reqntid 32", ".reqntid 32, 2, 1"))
    assert parse(program("").replace(".reqntid 32", ".reqntid 32, 1, 1")).threads == 32
    with pytest.raises(EmulationError, match=r"line \d+: cannot read the operand #"):
        parse(program("mov.u32 %w0, #;"))
    with pytest.raises(EmulationError, match=r"declared as \.b64 and \.b32"):
        parse(program("{ .reg .b64 %w1; }"))


def test_scopes_comments_and_vectors_are_read():
    text = program(
        """
        /* one; */ // two;
        .loc 1 2 3 // mov.u32 nothing;
        { .reg .pred p; .reg .b32 a<2>; setp.eq.u32 p, 1, 1; @p mov.b32 a0, 0x10; mov.b32 %w0, a0; }
        """
    )
    read = prepare(parse(text)).program
    assert [each.opcode for each in read.instructions] == [
        "setp.eq.u32",
        "mov.b32",
        "mov.b32",
        "ret",
    ]
    assert read.instructions[0].line == text[: text.index("setp")].count("\n") + 1
    np.testing.assert_array_equal(
        evaluate(
            "{ .reg .b32 inner; add.u32 inner, %w1, 1; mov.b32 %w0, inner; }",
            32,
            np.arange(3, dtype=np.uint32),
        ),
        [1, 2, 3],
    )
