"""Products of matrices against NumPy's, with the layouts written out from the PTX manual.

All numbers are small integers, whose products and sums are exact in every type.
"""

import numpy as np
import pytest
from emulator import EmulationError
from ptx_snippets import run

BITS = {
    "f16": lambda x: x.astype(np.float16).view(np.uint16),
    "bf16": lambda x: (x.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16),
    "tf32": lambda x: x.astype(np.float32).view(np.uint32),
}


def integers(*shape, seed=0):
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float64)


def words(values, type_):
    """Pack elements (..., 2 w) or (..., w) into 32-bit words."""
    bits = np.ascontiguousarray(BITS[type_](values))
    return bits.view(np.uint32)


def run_on_registers(statement, inputs, outputs, threads=32, shared=None, extra=""):
    """Run a statement on %w10 and on, filled from (threads, registers), and return results.

    Results are the last ``outputs`` registers from %w10 on that are written, in order.
    """
    source = np.ascontiguousarray(inputs, dtype=np.uint32)
    count = source.shape[1]
    out = np.zeros((threads, outputs), np.uint32)
    body = "mov.u32 %w1, %tid.x; cvt.u64.u32 %l1, %w1;"
    arrays = [source, out]
    if shared is not None:
        whole = np.zeros(-(-shared.nbytes // 16) * 16 + 16, np.uint8)
        start = -whole.ctypes.data % 16
        image = whole[start : start + shared.nbytes]
        image[:] = shared.view(np.uint8)
        arrays.append(image)
        for first in range(0, len(image), 16 * threads):
            body += f"""
                mad.lo.u32 %w2, %w1, 16, {first};
                setp.lt.u32 %p1, %w2, {len(image)};
                cvt.u64.u32 %l3, %w2; add.s64 %l3, %l3, %l22;
                @%p1 cp.async.cg.shared.global [%w2], [%l3], 16;
            """
        body += "cp.async.wait_all; bar.sync 0;"
    body += f"mul.lo.s64 %l2, %l1, {4 * count}; add.s64 %l2, %l2, %l20;"
    body += "".join(f"ld.global.b32 %w{10 + i}, [%l2+{4 * i}];" for i in range(count))
    body += extra + statement
    body += f"mul.lo.s64 %l2, %l1, {4 * outputs}; add.s64 %l2, %l2, %l21;"
    body += "".join(f"st.global.b32 [%l2+{4 * i}], %w{10 + i};" for i in range(outputs))
    run(body, *arrays, threads=threads, shared_bytes=0 if shared is None else shared.nbytes)
    return out.view(np.float32)


def names(first, count):
    return "{" + ", ".join(f"%w{first + i}" for i in range(count)) + "}"


@pytest.mark.parametrize(
    ("type_", "k"), [("f16", 16), ("bf16", 16), ("f16", 8), ("bf16", 8), ("tf32", 8)]
)
def test_products_of_a_warp(type_, k):
    a, b, c = integers(16, k), integers(k, 8, seed=1), integers(16, 8, seed=2)
    registers = np.zeros((32, 0), np.uint32)
    left, right, start = [], [], []
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        if type_ == "tf32":
            left.append(
                words(
                    np.array(
                        [
                            a[group, thread],
                            a[group + 8, thread],
                            a[group, thread + 4],
                            a[group + 8, thread + 4],
                        ]
                    ),
                    type_,
                )
            )
            right.append(words(np.array([b[thread, group], b[thread + 4, group]]), type_))
        else:
            elements = []
            for i in range(8 if k == 16 else 4):
                row = group if i in (0, 1, 4, 5) else group + 8
                elements.append(a[row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)])
            left.append(words(np.array(elements), type_))
            elements = [
                b[thread * 2 + (i & 1) + (8 if i >= 2 else 0), group] for i in range(k // 4)
            ]
            right.append(words(np.array(elements), type_))
        start.append(
            words(
                np.array([c[group + 8 * (i >= 2), thread * 2 + (i & 1)] for i in range(4)]), "tf32"
            )
        )
    registers = np.concatenate([np.array(start), np.array(left), np.array(right)], axis=1)
    at_b = 14 + len(left[0])
    made = run_on_registers(
        f"mma.sync.aligned.m16n8k{k}.row.col.f32.{type_}.{type_}.f32 {names(10, 4)}, "
        f"{names(14, len(left[0]))}, {names(at_b, len(right[0]))}, {names(10, 4)};",
        registers,
        4,
    )
    expected = a @ b + c
    for lane in range(32):
        for i in range(4):
            row, column = lane // 4 + 8 * (i >= 2), lane % 4 * 2 + (i & 1)
            assert made[lane, i] == expected[row, column]


def test_the_sum_is_rounded_once_and_tf32_is_cut():
    """One product of each element: 1 * (1 + 2**-10) + 2**-40, and 2**-13 is not read."""
    left = np.zeros((32, 4), np.float32)
    left[:, 0] = np.float32(1 + 2**-10 + 2**-13)
    right = np.ones((32, 2), np.float32)
    start = np.full((32, 4), 2.0**-40, np.float32)
    registers = np.concatenate([start, left, right], axis=1).view(np.uint32)
    made = run_on_registers(
        f"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {names(10, 4)}, {names(14, 4)}, "
        f"{names(18, 2)}, {names(10, 4)};",
        registers,
        4,
    )
    np.testing.assert_array_equal(made[:, 0], np.float32(4 * (1 + 2**-10)))


def stored_by_rows(values, type_, swizzle):
    """A matrix whose columns run fastest, as (bytes of shared memory, leading, stride).

    Rows of ``swizzle`` bytes (16 without one), in groups of eight that lie one after the other.
    """
    rows, columns = values.shape
    size = 4 if type_ == "tf32" else 2
    raw = np.ascontiguousarray(BITS[type_](values)).view(np.uint8).reshape(rows, columns * size)
    if swizzle == 0:
        # Blocks of 8 rows x 16 bytes: those of eight rows beside each other, then the next rows.
        blocks = raw.reshape(rows // 8, 8, columns * size // 16, 16).transpose(0, 2, 1, 3)
        return blocks.reshape(-1), 128, 128 * (columns * size // 16)
    image = np.zeros((rows, swizzle), np.uint8)
    image[:, : columns * size] = raw
    return swizzled(image, swizzle).reshape(-1), 0, 8 * swizzle


def stored_by_columns(values, type_, swizzle):
    """A matrix whose rows run fastest: tiles of ``swizzle`` bytes of rows x 8 columns."""
    rows, columns = values.shape
    raw = np.ascontiguousarray(BITS[type_](values.T)).view(np.uint8)  # (columns, 2 rows)
    width = swizzle or 16
    tiles = raw.reshape(columns // 8, 8, 2 * rows // width, width).transpose(2, 0, 1, 3)
    image = np.ascontiguousarray(tiles).reshape(-1, width)
    between_columns, between_rows = 8 * width, columns * width
    if swizzle == 0:
        return image.reshape(-1), between_columns, between_rows
    return swizzled(image, swizzle).reshape(-1), between_rows, between_columns


def swizzled(image, swizzle):
    """Exchange the chunks of 16 bytes of a row by the number of the 128 bytes that it lies in."""
    result = np.zeros_like(image)
    for row in range(len(image)):
        for chunk in range(swizzle // 16):
            number = row * swizzle // 128 % (swizzle // 16)
            target = chunk ^ number
            result[row, 16 * target : 16 * target + 16] = image[row, 16 * chunk : 16 * chunk + 16]
    return result


def descriptor(start, leading, stride, swizzle):
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    return start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | mode << 62


def group_product(a, b, c, type_, swizzle, transposed, in_registers, keep=1, signs=(1, 1)):
    """D of a group of 128 threads, from shared memory or with A in registers."""
    n, k = b.shape[1], a.shape[1]
    store = [stored_by_columns if t else stored_by_rows for t in transposed]
    image_a, *strides_a = store[0](a, type_, swizzle)
    image_b, *strides_b = store[1](b.T, type_, swizzle)
    start_b = -(-len(image_a) // 1024) * 1024
    shared = np.zeros(start_b + len(image_b), np.uint8)
    shared[: len(image_a)], shared[start_b:] = image_a, image_b
    per_thread = n // 2
    registers = np.zeros((128, per_thread + 4), np.uint32)
    for thread in range(128):
        warp, group, lane = thread // 32, thread % 32 // 4, thread % 4
        for i in range(per_thread):
            row, column = 16 * warp + group + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * lane + i % 2
            registers[thread, i] = c[row, column].astype(np.float32).view(np.uint32)
        for i in range(4):
            row = 16 * warp + group + 8 * (i % 2)
            if type_ == "tf32":
                values = a[row, lane + 4 * (i // 2)]
            else:
                values = a[row, 2 * lane + 8 * (i // 2) : 2 * lane + 8 * (i // 2) + 2]
            registers[thread, per_thread + i] = words(np.atleast_1d(values), type_)[0]
    left = names(10 + per_thread, 4) if in_registers else "%l5"
    flags = list(signs)
    if type_ != "tf32":
        flags += [int(t) for t in (transposed[1:] if in_registers else transposed)]
    statement = f"""
        mov.b64 %l5, {descriptor(0, *strides_a, swizzle)};
        mov.b64 %l6, {descriptor(start_b, *strides_b, swizzle)};
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{type_}.{type_} {names(10, per_thread)},
            {left}, %l6, {keep}, {", ".join(map(str, flags))};
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
    """
    made = run_on_registers(statement, registers, per_thread, threads=128, shared=shared)
    result = np.zeros((64, n))
    for thread in range(128):
        warp, group, lane = thread // 32, thread % 32 // 4, thread % 4
        for i in range(per_thread):
            row, column = 16 * warp + group + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * lane + i % 2
            result[row, column] = made[thread, i]
    return result


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize(
    ("type_", "transposed"),
    [
        ("bf16", (False, False)),
        ("f16", (False, True)),
        ("bf16", (True, False)),
        ("f16", (True, True)),
        ("tf32", (False, False)),
    ],
)
def test_products_of_a_group(type_, transposed, swizzle):
    k, n = (8 if type_ == "tf32" else 16), 64
    a, b, c = integers(64, k), integers(k, n, seed=1), integers(64, n, seed=2)
    made = group_product(a, b, c, type_, swizzle, transposed, in_registers=False)
    np.testing.assert_array_equal(made, a @ b + c)


@pytest.mark.parametrize("type_", ["bf16", "f16", "tf32"])
@pytest.mark.parametrize("n", [8, 32])
def test_products_of_a_group_with_a_factor_in_registers(type_, n):
    k = 8 if type_ == "tf32" else 16
    a, b, c = integers(64, k), integers(k, n, seed=1), integers(64, n, seed=2)
    made = group_product(a, b, c, type_, 32, (False, False), in_registers=True)
    np.testing.assert_array_equal(made, a @ b + c)


def test_an_accumulator_that_is_not_kept_and_signs():
    a, b, c = integers(64, 16), integers(16, 8, seed=1), np.full((64, 8), np.nan)
    made = group_product(a, b, c, "bf16", 128, (False, False), False, keep=0)
    np.testing.assert_array_equal(made, a @ b)
    made = group_product(a, b, 0 * a[:, :8], "bf16", 128, (False, False), False, signs=(-1, 1))
    np.testing.assert_array_equal(made, -a @ b)


def test_matrices_beyond_shared_memory_are_caught():
    shared = np.zeros(1024, np.uint8)
    statement = f"""
        mov.b64 %l5, {descriptor(0, 0, 1024, 128)};
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {names(10, 4)}, %l5, %l5, 0, 1, 1, 0, 0;
    """
    with pytest.raises(EmulationError, match=r"out of bounds at byte .* of shared memory: line"):
        run_on_registers(statement, np.zeros((128, 4)), 4, threads=128, shared=shared)


@pytest.mark.parametrize(
    ("opcode", "message"),
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.tf32.tf32.f32", "unknown instruction"),
        ("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16", "unknown instruction"),
        ("wgmma.mma_async.sync.aligned.m64n12k16.f32.bf16.bf16", "unknown instruction"),
    ],
)
def test_other_shapes_are_refused(opcode, message):
    with pytest.raises(EmulationError, match=message):
        run(f"{opcode} {names(10, 4)}, {names(10, 4)}, {names(10, 2)}, {names(10, 4)};")
