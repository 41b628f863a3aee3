"""Instructions of whole warps against the loops of the manual."""

import numpy as np
import pytest
from ptx_snippets import evaluate, run

THREADS = 64


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("clamp", [0x1F, 0, 0x181F, 0x1C03, 0x1007, 0x1800])
def test_shuffles(mode, clamp):
    value = np.random.default_rng(0).integers(0, 2**32, THREADS, dtype=np.uint32)
    for offset in (*range(0, 32, 5), 31):
        made, inside = evaluate(
            f"shfl.sync.{mode}.b32 %w0|%p1, %w1, {offset}, {clamp}, -1; selp.b32 %w10, 1, 0, %p1;",
            32,
            value,
            results=2,
        )
        for thread in range(THREADS):
            lane, warp = thread % 32, thread // 32 * 32
            bound, segment = clamp & 31, clamp >> 8 & 31
            last = (lane & segment) | (bound & ~segment & 31)
            first = lane & segment
            source, valid = {
                "up": (lane - offset, lane - offset >= last),
                "down": (lane + offset, lane + offset <= last),
                "bfly": (lane ^ offset, lane ^ offset <= last),
                "idx": (
                    first | (offset & ~segment & 31),
                    (first | (offset & ~segment & 31)) <= last,
                ),
            }[mode]
            assert made[thread] == value[warp + (source if valid else lane)]
            assert inside[thread] == valid


def test_every_lane_may_ask_for_another():
    value = np.arange(THREADS, dtype=np.uint32)
    lanes = np.random.default_rng(1).integers(0, 32, THREADS).astype(np.uint32)
    made = evaluate("shfl.sync.idx.b32 %w0, %w1, %w2, 31, -1;", 32, value, lanes)
    np.testing.assert_array_equal(made, value // 32 * 32 + lanes)


def test_votes():
    truth = np.array([i % 3 == 0 for i in range(32)] + [True] * 32)
    for mode, expected in (("all", [0, 1]), ("any", [1, 1]), ("uni", [0, 1])):
        made = evaluate(f"vote.sync.{mode}.pred %p0, %p1, -1;", 1, truth)
        np.testing.assert_array_equal(made, np.repeat(expected, 32))
    made = evaluate("vote.sync.ballot.b32 %w0, %p1, -1;", 32, truth)
    expected = [sum(1 << i for i in range(0, 32, 3)), 2**32 - 1]
    np.testing.assert_array_equal(made, np.repeat(np.array(expected, np.uint32), 32))


@pytest.mark.parametrize(
    ("name", "kind", "function"),
    [("add", "u", sum), ("min", "s", min), ("max", "s", max), ("min", "u", min), ("max", "u", max)],
)
def test_reductions(name, kind, function):
    value = np.random.default_rng(0).integers(0, 2**32, THREADS, dtype=np.uint32)
    made = evaluate(f"redux.sync.{name}.{kind}32 %w0, %w1, -1;", 32, value)
    numbers = value.view(np.int32) if kind == "s" else value
    for warp in range(2):
        expected = function(int(x) for x in numbers[32 * warp : 32 * warp + 32]) % 2**32
        assert (made[32 * warp : 32 * warp + 32] == expected).all()


def test_one_thread_of_a_warp_is_elected():
    made = evaluate("elect.sync %w1|%p0, -1;", 1, np.arange(THREADS, dtype=np.uint32))
    assert made.sum() == 2


def stored(count, trans):
    """Store fragments 0, 1, 2 ... of each thread as matrices, and read shared memory back."""
    suffix = ".trans" if trans else ""
    registers = ", ".join(f"%w{10 + i}" for i in range(count))
    halves = [
        f"mad.lo.u32 %w20, %w1, 2, {64 * i}; add.u32 %w21, %w20, 1; shl.b32 %w21, %w21, 16;"
        f"or.b32 %w{10 + i}, %w20, %w21;"
        for i in range(count)
    ]
    out = np.zeros(count * 64, np.uint16)
    body = f"""
        mov.u32 %w1, %tid.x;
        {"".join(halves)}
        and.b32 %w2, %w1, {8 * count - 1};
        shl.b32 %w2, %w2, 4;
        stmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 [%w2], {{{registers}}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 {{{registers}}}, [%w2];
    """
    for i in range(2 * count):
        body += f"""
            mad.lo.u32 %w30, %w1, {2 * count}, {i}; shl.b32 %w30, %w30, 1; cvt.u64.u32 %l1, %w30;
            ld.shared.b16 %h1, [%w30]; add.s64 %l2, %l20, %l1; st.global.b16 [%l2], %h1;
        """
    back = np.zeros((32, count), np.uint32)
    for i in range(count):
        body += f"""
            mad.lo.u32 %w30, %w1, {count}, {i}; shl.b32 %w30, %w30, 2; cvt.u64.u32 %l1, %w30;
            add.s64 %l2, %l21, %l1; st.global.b32 [%l2], %w{10 + i};
        """
    run(body, out, back, shared_bytes=out.nbytes)
    return out.reshape(count, 8, 8), back


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_matrices_of_eight_rows(count, trans):
    """Lane l holds the elements (l // 4, 2 (l % 4)) and the next, of the transpose if so."""
    made, back = stored(count, trans)
    for number in range(count):
        # Lane l gives 64 number + 2 l and the next: row by row the numbers from 64 number on.
        expected = 64 * number + np.arange(64).reshape(8, 8)
        np.testing.assert_array_equal(made[number], expected.T if trans else expected)
        lane = np.arange(32, dtype=np.uint32)
        low = 64 * number + 2 * lane
        np.testing.assert_array_equal(back[:, number], low | (low + 1) << 16)
