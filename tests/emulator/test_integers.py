"""Instructions on integers against Python's own, which have no width."""

import itertools

import numpy as np
import pytest
from ptx_snippets import UNSIGNED, evaluate

EDGES = {
    bits: [0, 1, 2, 3, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2 ** (bits - 1) + 1, 2**bits - 1]
    for bits in (16, 32, 64)
}
WIDTH = {16: "h", 32: "w", 64: "l"}


def signed(value, bits):
    value %= 2**bits
    return value - 2**bits if value >= 2 ** (bits - 1) else value


def operands(bits, count, number=300):
    """Every combination of edges for two operands, and random ones."""
    random = np.random.default_rng(bits + count)
    rows = list(itertools.product(EDGES[bits], repeat=min(count, 2)))
    rows = [(*row, *row)[:count] for row in rows]
    rows += (
        random.integers(0, 2**bits, (number, count), dtype=np.uint64, endpoint=False).tolist()
        if bits < 64
        else [
            tuple(int(x) for x in row)
            for row in random.integers(0, 2**64 - 1, (number, count), dtype=np.uint64)
        ]
    )
    return [np.array(column, dtype=UNSIGNED[bits]) for column in zip(*rows, strict=True)]


def check(opcode, bits, expected, count=2, result_bits=None, source_bits=None):
    """Run an opcode and compare with a function of unsigned Python integers, modulo 2**bits."""
    result_bits = result_bits or bits
    source_bits = source_bits or (bits,) * count
    sources = operands(bits, count)
    sources = [s.astype(UNSIGNED[b]) for s, b in zip(sources, source_bits, strict=True)]
    names = ", ".join(f"%{WIDTH[b]}{i}" for i, b in enumerate(source_bits, 1))
    made = evaluate(f"{opcode} %{WIDTH[result_bits]}0, {names};", result_bits, *sources)
    for row in zip(made, *sources, strict=True):
        result, *values = map(int, row)
        assert result == expected(*values) % 2**result_bits, (opcode, values)


def quotient(a, b):
    if b == 0:
        return -1
    magnitude = abs(a) // abs(b)
    return -magnitude if (a < 0) != (b < 0) else magnitude


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_arithmetic(bits):
    def s(x):
        return signed(x, bits)

    for kind in "su":
        check(f"add.{kind}{bits}", bits, lambda a, b: a + b)
        check(f"sub.{kind}{bits}", bits, lambda a, b: a - b)
        check(f"mul.lo.{kind}{bits}", bits, lambda a, b: a * b)
        check(f"mad.lo.{kind}{bits}", bits, lambda a, b, c: a * b + c, 3)
    check(f"mul.hi.u{bits}", bits, lambda a, b: a * b >> bits)
    check(f"mul.hi.s{bits}", bits, lambda a, b: s(a) * s(b) >> bits)
    check(f"mad.hi.u{bits}", bits, lambda a, b, c: (a * b >> bits) + c, 3)
    check(f"min.u{bits}", bits, min)
    check(f"max.u{bits}", bits, max)
    check(f"min.s{bits}", bits, lambda a, b: min(s(a), s(b)))
    check(f"max.s{bits}", bits, lambda a, b: max(s(a), s(b)))
    check(f"neg.s{bits}", bits, lambda a: -a, 1)
    check(f"abs.s{bits}", bits, lambda a: abs(s(a)), 1)
    check(f"div.u{bits}", bits, lambda a, b: quotient(a, b))
    check(f"div.s{bits}", bits, lambda a, b: quotient(s(a), s(b)))
    check(f"rem.u{bits}", bits, lambda a, b: a % b if b else a)
    check(f"rem.s{bits}", bits, lambda a, b: s(a) - quotient(s(a), s(b)) * s(b) if b else a)


@pytest.mark.parametrize("bits", [16, 32])
def test_wide_products(bits):
    def s(x):
        return signed(x, bits)

    wide = 2 * bits
    check(f"mul.wide.u{bits}", bits, lambda a, b: a * b, 2, wide)
    check(f"mul.wide.s{bits}", bits, lambda a, b: s(a) * s(b), 2, wide)
    types = (bits, bits, wide)
    check(f"mad.wide.u{bits}", bits, lambda a, b, c: a * b + c, 3, wide, types)
    check(f"mad.wide.s{bits}", bits, lambda a, b, c: s(a) * s(b) + c, 3, wide, types)


def test_saturated_sums():
    def clamp(x):
        return max(-(2**31), min(2**31 - 1, x))

    check("add.sat.s32", 32, lambda a, b: clamp(signed(a, 32) + signed(b, 32)))
    check("sub.sat.s32", 32, lambda a, b: clamp(signed(a, 32) - signed(b, 32)))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bits(bits):
    check(f"and.b{bits}", bits, lambda a, b: a & b)
    check(f"or.b{bits}", bits, lambda a, b: a | b)
    check(f"xor.b{bits}", bits, lambda a, b: a ^ b)
    check(f"not.b{bits}", bits, lambda a: ~a, 1)
    if bits > 16:
        check(f"popc.b{bits}", bits, lambda a: a.bit_count(), 1, 32)
        check(f"clz.b{bits}", bits, lambda a: bits - a.bit_length(), 1, 32)
        check(f"brev.b{bits}", bits, lambda a: int(f"{a:0{bits}b}"[::-1], 2), 1)
    check("bfind.u32", 32, lambda a: a.bit_length() - 1, 1)
    check("bfind.shiftamt.u32", 32, lambda a: 32 - a.bit_length() if a else -1, 1)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts(bits):
    amounts = np.array([0, 1, 7, bits - 1, bits, bits + 1, 2**31, 2**32 - 1], dtype=np.uint32)
    (values,) = operands(bits, 1, 20)
    a, amount = (x.ravel() for x in np.meshgrid(values, amounts))
    name = WIDTH[bits]
    for opcode, expected in (
        (f"shl.b{bits}", lambda a, n: a << min(n, bits)),
        (f"shr.u{bits}", lambda a, n: a >> min(n, bits)),
        (f"shr.b{bits}", lambda a, n: a >> min(n, bits)),
        (f"shr.s{bits}", lambda a, n: signed(a, bits) >> min(n, bits)),
    ):
        made = evaluate(f"{opcode} %{name}0, %{name}1, %w2;", bits, a, amount)
        for result, value, n in zip(made, a, amount, strict=True):
            assert int(result) == expected(int(value), int(n)) % 2**bits, (opcode, value, n)


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts(mode):
    a, b = operands(32, 2)
    n = np.resize(np.array([0, 1, 8, 31, 32, 33, 63, 2**32 - 1], np.uint32), len(a))
    left = evaluate(f"shf.l.{mode}.b32 %w0, %w1, %w2, %w3;", 32, a, b, n)
    right = evaluate(f"shf.r.{mode}.b32 %w0, %w1, %w2, %w3;", 32, a, b, n)
    for made_left, made_right, x, y, amount in zip(left, right, a, b, n, strict=True):
        count = int(amount) % 32 if mode == "wrap" else min(int(amount), 32)
        both = int(y) << 32 | int(x)
        assert int(made_left) == both << count >> 32 & 0xFFFFFFFF
        assert int(made_right) == both >> count & 0xFFFFFFFF


@pytest.mark.parametrize("bits", [32, 64])
def test_fields(bits):
    """By the loops of the manual."""
    cases = list(
        itertools.product(
            EDGES[bits] + [0x12345678], (0, 1, 5, bits - 1, bits, 255), (0, 1, 8, bits, 255)
        )
    )
    values, starts, lengths = (
        np.array(column, dtype=object) for column in zip(*cases, strict=True)
    )
    value = values.astype(UNSIGNED[bits])
    start, length = starts.astype(np.uint32), lengths.astype(np.uint32)
    name = WIDTH[bits]
    unsigned = evaluate(f"bfe.u{bits} %{name}0, %{name}1, %w2, %w3;", bits, value, start, length)
    with_sign = evaluate(f"bfe.s{bits} %{name}0, %{name}1, %w2, %w3;", bits, value, start, length)
    inserted = evaluate(
        f"bfi.b{bits} %{name}0, %{name}1, %{name}4, %w2, %w3;",
        bits,
        value,
        start,
        length,
        value[::-1],
    )
    for i, (a, position, count) in enumerate(cases):

        def bit(x, n):
            return x >> n & 1

        sign = 0 if count == 0 else bit(a, min(position + count - 1, bits - 1))
        field = sum(
            (bit(a, position + k) if k < count and position + k < bits else 0) << k
            for k in range(bits)
        )
        extended = sum(
            (bit(a, position + k) if k < count and position + k < bits else sign) << k
            for k in range(bits)
        )
        target = int(value[::-1][i])
        for k in range(count):
            if position + k < bits:
                place = 1 << (position + k)
                target = target & ~place | (place if bit(a, k) else 0)
        assert int(unsigned[i]) == field
        assert int(with_sign[i]) == extended
        assert int(inserted[i]) == target


def test_permuted_bytes():
    a, b, selector = operands(32, 3)
    made = evaluate("prmt.b32 %w0, %w1, %w2, %w3;", 32, a, b, selector)
    for result, x, y, choice in zip(made, a, b, selector, strict=True):
        source = int(x).to_bytes(4, "little") + int(y).to_bytes(4, "little")
        expected = []
        for i in range(4):
            nibble = int(choice) >> 4 * i & 15
            byte = source[nibble & 7]
            expected.append((255 if byte & 128 else 0) if nibble & 8 else byte)
        assert int(result).to_bytes(4, "little") == bytes(expected)


@pytest.mark.parametrize("table", [0, 0x80, 0xE8, 0x96, 0xD8, 0x3C])
def test_logic_of_three(table):
    a, b, c = operands(32, 3, 40)
    made = evaluate(f"lop3.b32 %w0, %w1, %w2, %w3, {table};", 32, a, b, c)
    for result, x, y, z in zip(made, a, b, c, strict=True):
        expected = 0
        for i in range(32):
            index = (int(x) >> i & 1) << 2 | (int(y) >> i & 1) << 1 | int(z) >> i & 1
            expected |= (table >> index & 1) << i
        assert int(result) == expected


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_comparisons(bits):
    a, b = operands(bits, 2, 50)
    name = WIDTH[bits]
    third = np.arange(len(a)) % 3 == 0
    cases = [(k, kind, expected) for k, expected in COMPARISONS.items() for kind in "su"]
    cases += [(k, "b", COMPARISONS[k]) for k in ("eq", "ne")]
    names = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
    cases += [(k, "u", COMPARISONS[v]) for k, v in names.items()]
    for k, kind, expected in cases:
        if kind == "s":
            wanted = [
                expected(signed(int(x), bits), signed(int(y), bits))
                for x, y in zip(a, b, strict=True)
            ]
        else:
            wanted = [expected(int(x), int(y)) for x, y in zip(a, b, strict=True)]
        wanted = np.array(wanted)
        made = evaluate(f"setp.{k}.{kind}{bits} %p0, %{name}1, %{name}2;", 1, a, b)
        np.testing.assert_array_equal(made.astype(bool), wanted)
        for how, join in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
            both = evaluate(
                f"setp.{k}.{how}.{kind}{bits} %p0|%p10, %{name}1, %{name}2, !%p3;",
                1,
                a,
                b,
                third,
                results=2,
            )
            np.testing.assert_array_equal(both[0].astype(bool), join(wanted, ~third))
            np.testing.assert_array_equal(both[1].astype(bool), join(~wanted, ~third))


def test_choice_and_predicates():
    a, b = operands(32, 2, 10)
    p, q = np.arange(len(a)) % 2 == 0, np.arange(len(a)) % 3 == 0
    np.testing.assert_array_equal(
        evaluate("selp.f32 %w0, %w1, %w2, %p3;", 32, a, b, p), np.where(p, a, b)
    )
    for name, join in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        made = evaluate(f"{name}.pred %p0, %p1, %p2;", 1, p, q)
        np.testing.assert_array_equal(made, join(p, q))
    np.testing.assert_array_equal(evaluate("not.pred %p0, %p1;", 1, p), ~p)
    np.testing.assert_array_equal(evaluate("mov.pred %p0, -1;", 1, p), np.ones(len(p)))


def test_parts_of_words():
    low, high = operands(32, 2, 10)
    made = evaluate("mov.b64 %l0, {%w1, %w2};", 64, low, high)
    assert [int(x) for x in made] == [int(h) << 32 | int(x) for x, h in zip(low, high, strict=True)]
    first, second = evaluate("mov.b64 {%w0, %w10}, %l1;", 32, made, results=2)
    np.testing.assert_array_equal(first, low)
    np.testing.assert_array_equal(second, high)


INTEGERS = [f"{kind}{bits}" for kind in "us" for bits in (16, 32, 64)]


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("result", INTEGERS)
def test_conversions(source, result):
    bits, out = int(source[1:]), int(result[1:])
    (a,) = operands(bits, 1, 50)
    registers = f"%{WIDTH[out]}0, %{WIDTH[bits]}1"
    plain = evaluate(f"cvt.{result}.{source} {registers};", out, a)
    saturated = evaluate(f"cvt.sat.{result}.{source} {registers};", out, a)
    low, high = (-(2 ** (out - 1)), 2 ** (out - 1) - 1) if result[0] == "s" else (0, 2**out - 1)
    for value, one, other in zip(a, plain, saturated, strict=True):
        number = signed(int(value), bits) if source[0] == "s" else int(value)
        assert int(one) == number % 2**out
        assert int(other) == max(low, min(high, number)) % 2**out


def test_results_are_extended_to_wider_registers():
    a = np.array([0x80, 0x7F, 0xFFFF], np.uint32)
    np.testing.assert_array_equal(
        evaluate("cvt.s8.s32 %w0, %w1;", 32, a), np.array([0xFFFFFF80, 0x7F, 0xFFFFFFFF])
    )
    np.testing.assert_array_equal(evaluate("cvt.u8.u32 %w0, %w1;", 32, a), [0x80, 0x7F, 0xFF])
