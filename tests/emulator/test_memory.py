"""Memory: values go where they belong, and every access that is wrong is caught."""

import numpy as np
import pytest
import torch
from emulator import EmulationError, GlobalMemory
from emulator.memory import extent, extent_of_array, sparse_tensor
from ptx_snippets import UNSIGNED, run

ADDRESS = (
    "mov.u32 %w100, %tid.x; mul.wide.u32 %l10, %w100, {step}; add.s64 %l10, %l10, %l{pointer};"
)


def aligned(size, dtype=np.uint8, offset=0):
    """Zeros whose first address is a multiple of 16, plus an offset in bytes."""
    count = size * np.dtype(dtype).itemsize
    buffer = np.zeros(count + 64, np.uint8)
    start = -buffer.ctypes.data % 16 + offset
    return buffer[start : start + count].view(dtype)


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_vectors_are_read_and_written_whole(bits, count):
    if bits * count > 128:
        return
    random = np.random.default_rng(bits)
    source = aligned(32 * count, UNSIGNED[bits])
    source[:] = random.integers(0, 2**bits - 1, len(source), dtype=np.uint64)
    target = aligned(32 * count, UNSIGNED[bits])
    name = {8: "h", 16: "h", 32: "w", 64: "l"}[bits]
    registers = [f"%{name}{i}" for i in range(count)]
    data = registers[0] if count == 1 else "{" + ", ".join(registers) + "}"
    vector = "" if count == 1 else f".v{count}"
    step = bits // 8 * count
    run(
        ADDRESS.format(step=step, pointer=20)
        + f"ld.global.L1::evict_last{vector}.b{bits} {data}, [%l10];"
        + ADDRESS.format(step=step, pointer=21)
        + f"st.global{vector}.b{bits} [%l10], {data};",
        source,
        target,
    )
    np.testing.assert_array_equal(target, source)


def test_narrow_numbers_are_extended_by_their_type():
    source = aligned(32, np.uint8)
    source[:] = np.arange(0, 256, 8)
    target = aligned(64, np.uint32)
    run(
        ADDRESS.format(step=1, pointer=20)
        + "ld.global.s8 %w1, [%l10]; ld.global.u8 %w2, [%l10];"
        + ADDRESS.format(step=8, pointer=21)
        + "st.global.v2.b32 [%l10], {%w1, %w2};",
        source,
        target,
    )
    np.testing.assert_array_equal(
        target[0::2], source.view(np.int8).astype(np.int32).view(np.uint32)
    )
    np.testing.assert_array_equal(target[1::2], source)


@pytest.mark.parametrize(
    ("size", "statement", "message"),
    [
        (
            128,
            "ld.global.b32 %w1, [%l10+4];",
            r"4-byte access .* \(1 threads\), at byte 128 of .* 128",
        ),
        (128, "ld.global.b32 %w1, [%l10+-4];", r"at byte -4 of"),
        (127, "st.global.b32 [%l10], 1;", r"at byte 124 of the nearest allocation, which has 127"),
        (128, "ld.global.v2.b32 {%w1, %w2}, [%l10];", r"not aligned \(16 threads\)"),
        (128, "@%p1 st.global.b32 [%l10+4], 1;", "out of bounds"),
        (128, "st.global.b64 [%l10], %l10;", r"8-byte access at 0x\w+, which is not aligned"),
        (128, "ld.global.b32 %w1, [%l10+2];", "not aligned"),
    ],
)
def test_wrong_accesses_are_caught(size, statement, message):
    array = aligned(size)
    body = ADDRESS.format(step=4, pointer=20) + "setp.eq.u32 %p1, %w100, 31;" + statement
    with pytest.raises(EmulationError, match=message):
        run(body, array)


def test_threads_that_do_not_execute_access_nothing():
    array = aligned(32, np.uint32)
    body = (
        "setp.lt.u32 %p1, %w100, 31; @%p1 st.global.b32 [%l10+4], 3; @!%p1 st.global.b32 [%l20], 4;"
    )
    run(ADDRESS.format(step=4, pointer=20) + body, array)
    np.testing.assert_array_equal(array, [4, *[3] * 31])


def test_an_access_may_not_reach_from_one_allocation_into_the_next():
    buffer = aligned(32)
    neighbours = [(extent_of_array(buffer)[0] + i, 16) for i in (0, 16)]
    memory = GlobalMemory(neighbours)
    addresses = np.array([neighbours[0][0] + 8], np.uint64)
    assert memory.gather(addresses, 8, 1)[0] == 0
    one = GlobalMemory([(neighbours[0][0] + 4, 16), (neighbours[0][0] + 20, 4)])
    with pytest.raises(EmulationError, match="out of bounds"):
        one.gather(np.array([neighbours[0][0] + 16], np.uint64), 8, 1)


def test_an_allocation_starts_where_it_starts():
    array = aligned(33, np.uint16, offset=2)
    run(ADDRESS.format(step=2, pointer=20) + "mov.b16 %h1, 7; st.global.b16 [%l10+2], %h1;", array)
    np.testing.assert_array_equal(array, [0, *[7] * 32])
    with pytest.raises(EmulationError, match="at byte -2"):
        run("mov.b16 %h1, 7; st.global.b16 [%l20+-2], %h1;", array)


def test_the_extent_of_a_tensor_is_that_of_its_elements():
    whole = torch.zeros(10, 8)
    part = whole[2:5, 1:3]
    assert extent(part) == (whole.data_ptr() + 4 * 17, 4 * (2 * 8 + 2))
    assert extent(whole[:0])[1] == 0


def test_sparse_memory_is_far_larger_than_what_is_used():
    huge = sparse_tensor((2**20, 2**18), torch.bfloat16)
    huge[-1, -32:] = 1
    run(
        "ld.param.b64 %l1, [q0]; ld.global.b16 %h1, [%l1]; add.s64 %l2, %l1, -64;"
        "st.global.b16 [%l20], %h1;",
        result := np.zeros(1, np.uint16),
        parameters=("u64",),
        values=(result.ctypes.data,),
    )
    memory = GlobalMemory([extent(huge)])
    last = np.array([huge.data_ptr() + 2 * (2**38 - 1)], np.uint64)
    assert memory.gather(last, 2, 1)[0] == 0x3F80
    with pytest.raises(EmulationError, match=f"at byte {2**39} of"):
        memory.gather(last + np.uint64(2), 2, 1)


SHARED = (
    "mov.u32 %w1, %tid.x; shl.b32 %w2, %w1, 2; mov.u32 %w3, global_smem; add.u32 %w2, %w2, %w3;"
)


def test_shared_memory_belongs_to_a_block():
    out = np.zeros((3, 64), np.uint32)
    run(
        SHARED
        + """
        mov.u32 %w4, %ctaid.x;
        mad.lo.u32 %w5, %w4, 64, %w1;
        st.shared.b32 [%w2], %w5;
        bar.sync 0;
        mov.u32 %w6, 63;
        sub.u32 %w6, %w6, %w1;
        shl.b32 %w6, %w6, 2;
        ld.shared.b32 %w7, [%w6];
        mul.wide.u32 %l10, %w5, 4;
        add.s64 %l10, %l10, %l20;
        st.global.b32 [%l10], %w7;
        """,
        out,
        threads=64,
        grid=(3, 1, 1),
        shared_bytes=256,
    )
    np.testing.assert_array_equal(out, np.arange(192).reshape(3, 64)[:, ::-1])


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("st.shared.b32 [%w2+4], %w1;", "byte 128 of 128 bytes of shared"),
        ("ld.shared.b32 %w5, [%w2+-4];", "out of bounds"),
        ("ld.shared.v4.b32 {%w5, %w6, %w7, %w8}, [%w2];", "16-byte access .* not aligned"),
        ("cp.async.cg.shared.global [%w2], [%l20], 16;", "not aligned"),
    ],
)
def test_wrong_accesses_to_shared_memory_are_caught(statement, message):
    with pytest.raises(EmulationError, match=message):
        run(SHARED + statement, aligned(32), shared_bytes=128)


def test_copies_to_shared_memory_fill_up_with_zeros():
    source = aligned(128, np.uint32)
    source[:] = np.arange(128)
    out = aligned(128, np.uint32)
    run(
        """
        mov.u32 %w1, %tid.x;
        shl.b32 %w2, %w1, 4;
        cvt.u64.u32 %l1, %w2;
        add.s64 %l2, %l20, %l1;
        add.s64 %l3, %l21, %l1;
        setp.lt.u32 %p1, %w1, 20;
        selp.b32 %w3, 16, 0, %p1;
        selp.b64 %l2, %l2, 0, %p1;
        cp.async.cg.shared.global [%w2], [%l2], 0x10, %w3;
        cp.async.commit_group;
        cp.async.wait_group 0;
        bar.sync 0;
        ld.shared.v4.b32 {%w4, %w5, %w6, %w7}, [%w2];
        st.global.v4.b32 [%l3], {%w4, %w5, %w6, %w7};
        """,
        source,
        out,
        shared_bytes=512,
    )
    np.testing.assert_array_equal(out, np.where(np.arange(128) < 80, source, 0))


@pytest.mark.parametrize(
    ("opcode", "type_", "start", "values", "expected"),
    [
        ("add", "u32", 5, np.arange(32), 5 + 496),
        ("add", "f32", 0.5, np.arange(32) / 4, 0.5 + 124),
        ("max", "s32", -3, np.arange(32) - 40, -3),
        ("min", "s32", 7, np.arange(32) - 4, -4),
        ("or", "b32", 1, 2 ** (np.arange(32) % 8), 255),
        ("exch", "b32", 1, np.arange(32), 31),
    ],
)
def test_atomics_are_one_after_the_other(opcode, type_, start, values, expected):
    numpy = {"u": np.uint32, "b": np.uint32, "f": np.float32, "s": np.int32}[type_[0]]
    target = np.array([start], numpy)
    source = aligned(32, numpy)
    source[:] = values
    olds = aligned(32, np.uint32)
    body = ADDRESS.format(step=4, pointer=21) + "ld.global.b32 %w1, [%l10];"
    run(
        body
        + f"atom.global.gpu.acq_rel.{opcode}.{type_} %w2, [%l20], %w1;"
        + ADDRESS.format(step=4, pointer=22)
        + "st.global.b32 [%l10], %w2;",
        target,
        source,
        olds,
    )
    assert target[0] == expected
    assert olds.view(numpy)[0] == numpy(start)
    again = np.array([start], numpy)
    run(body + f"red.relaxed.gpu.global.{opcode}.{type_} [%l20], %w1;", again, source)
    assert again[0] == expected


def test_compare_and_swap_counts_to_the_number_of_threads():
    target = np.zeros(1, np.uint32)
    body = """
        $again:
        ld.global.b32 %w1, [%l20];
        add.u32 %w2, %w1, 1;
        atom.global.cas.b32 %w3, [%l20], %w1, %w2;
        setp.ne.u32 %p1, %w3, %w1;
        @%p1 bra $again;
    """
    run(body, target)
    assert target[0] == 32
